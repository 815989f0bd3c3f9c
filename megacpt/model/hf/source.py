"""A Hugging Face model folder: its configuration, and its tensors checked against it and read slice by slice."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megacpt.errors import UserError
from megacpt.model.hf.config_json import architecture_from
from megacpt.model.hf.families import family_of
from megacpt.model.hf.weight_files import Pickles, Safetensors, TensorInfo, WeightFiles


class Source:
    """An opened folder, checked: every tensor that the family's table asks for is there, and no other.

    Attributes:
        folder: where it lies.
        config: config.json as it is.
        family, architecture: the table it follows, and its shape.
        tensors: what the files hold, by Hugging Face's names.

    Raises:
        UserError: one sentence that names the tensor and the file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files, self.config = _open(self.folder)
        where = str(self.folder / "config.json")
        self.family = family_of(self.config, where)
        self.architecture = architecture_from(self.config, where)
        self.tensors = self._files.describe()
        self._check()

    def _check(self) -> None:
        expected = self.family.tensors(self.architecture)
        for name, home in expected.items():
            found = self.tensors.get(name)
            if found is None:
                raise UserError(
                    f"{self.folder}: tensor {name} is missing from {_listed(self.tensors)}; download the model again"
                )
            if found.dtype is None:
                raise UserError(
                    f"{found.file}: tensor {name} has type {found.dtype_name}, expected F32, F16 or BF16; use the "
                    "model's unquantised weights"
                )
            if found.shape != home.shape:
                raise UserError(
                    f"{found.file}: tensor {name} has shape {list(found.shape)}, config.json asks for "
                    f"{list(home.shape)}; the two files are not of one model"
                )
        present = self.family.weights_of(self.architecture)
        tied = [part.name for weight in self.family.weights if weight not in present for part in weight.parts]
        for name in self.tensors.keys() - expected.keys():
            if not name.endswith((*self.family.ignored, *tied)):
                raise UserError(
                    f"{self.tensors[name].file}: tensor {name} is none of {self.family.architecture}'s; the folder "
                    "holds another model, or an adapter"
                )

    @property
    def dtype(self) -> torch.dtype:
        """bf16 where all weights are; else fp32, which holds fp16 exactly."""
        return torch.bfloat16 if {t.dtype for t in self.tensors.values()} == {torch.bfloat16} else torch.float32

    def read(self, name: str, where: tuple[slice, ...] = ()) -> torch.Tensor:
        """One slice of one tensor, in the file's dtype; the whole tensor without `where`."""
        return self._files.read(name, where or (slice(None),) * len(self.tensors[name].shape))

    def close(self) -> None:
        """Let go of files and memory."""
        self._files.close()


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        UserError: there is none, or it is not a JSON object.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a Hugging Face model")
    return read_json(path, "it is no Hugging Face model folder")


def read_json(path: Path, otherwise: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: the file is missing (then `otherwise` says what that means) or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {otherwise}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; download it again")
    return found


def gguf_file(folder: str | Path) -> Path | None:
    """The folder's GGUF file where it has one and no other weights.

    Raises:
        UserError: there are several.
    """
    folder = Path(folder)
    if any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return None
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        raise UserError(f"{folder}: holds {len(found)} GGUF files ({found[0].name}, ...); keep one of them there")
    return found[0] if found else None


def _open(folder: Path) -> tuple[WeightFiles, dict[str, Any]]:
    gguf = gguf_file(folder) if folder.is_dir() else None
    if gguf is not None:
        from megacpt.model.hf.gguf import GGUF

        model = GGUF(gguf)
        return model, model.config
    config = read_config(folder)
    for single, index, kind in (
        ("model.safetensors", "model.safetensors.index.json", Safetensors),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", Pickles),
    ):
        if (folder / index).is_file():
            return kind(_indexed(folder / index)), config
        if (folder / single).is_file():
            return kind({folder / single: None}), config
    raise UserError(
        f"{folder}: holds no weights (model.safetensors or its index, pytorch_model.bin, a .gguf); download them"
    )


def _indexed(index: Path) -> Mapping[Path, set[str]]:
    """Files named by an index, and the tensors that each should hold."""
    mapping = read_json(index, "the shards need their index").get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(f, str) for f in mapping.values()):
        raise UserError(f"{index}: has no weight_map from tensors to files; download it again")
    files: dict[Path, set[str]] = {}
    for name, file in mapping.items():
        if Path(file).name != file:
            raise UserError(f"{index}: names a file outside its folder ({file}); download it again")
        files.setdefault(index.parent / file, set()).add(name)
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: no such file, though {index.name} names it; download it again")
    return files


def _listed(tensors: Mapping[str, TensorInfo]) -> str:
    names = sorted({info.file.name for info in tensors.values()})
    return names[0] if len(names) == 1 else f"its {len(names)} files"
