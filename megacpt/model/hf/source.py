"""A Hugging Face model folder: its configuration, and its tensors read slice by slice.

Safetensors files are memory-mapped, one at a time. `.bin` files go through torch.load's restricted unpickler, one at a
time. A GGUF file is dequantised whole by transformers, which also undoes its permutation of query and key rows.
"""

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from megacpt.errors import UserError
from megacpt.model.hf.config_json import architecture_from
from megacpt.model.hf.families import family_of

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Tensor types that hold weights, by their safetensors names."""
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Small files that belong to a model besides its weights."""


class TensorInfo(NamedTuple):
    """A tensor as its file describes it; `dtype` is None where it holds no weights (integers, fp8)."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    file: Path
    dtype_name: str


class _Files(Protocol):
    def describe(self) -> dict[str, TensorInfo]: ...

    def read(self, name: str, where: tuple[slice, ...]) -> torch.Tensor: ...

    def close(self) -> None: ...


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


def _open(folder: Path) -> tuple[_Files, dict[str, Any]]:
    gguf = gguf_file(folder) if folder.is_dir() else None
    if gguf is not None:
        from megacpt.model.hf.gguf import GGUF

        model = GGUF(gguf)
        return model, model.config
    config = read_config(folder)
    for single, index, kind in (
        ("model.safetensors", "model.safetensors.index.json", _Safetensors),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", _Pickles),
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


def _compare_with_index(path: Path, promised: set[str] | None, found: set[str]) -> None:
    if promised is not None and promised - found:
        missing = min(promised - found, key=_natural)
        raise UserError(f"{path}: tensor {missing} is missing, though the index promises it; download the file again")


def _natural(name: str) -> list[Any]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _listed(tensors: Mapping[str, TensorInfo]) -> str:
    names = sorted({info.file.name for info in tensors.values()})
    return names[0] if len(names) == 1 else f"its {len(names)} files"


class _Safetensors:
    """Safetensors files; the one read last stays mapped, so that at most one file's pages count as memory."""

    def __init__(self, files: Mapping[Path, set[str] | None]) -> None:
        self.files, self._open, self._path = files, None, None  # type: tuple[Any, Any, Any]
        self._where: dict[str, Path] = {}

    def _file(self, path: Path) -> Any:
        import safetensors

        if path != self._path:
            self.close()
            try:
                self._open = safetensors.safe_open(path, framework="pt")
            except (safetensors.SafetensorError, OSError) as error:
                raise UserError(f"{path}: truncated, or not a safetensors file ({error}); download it again") from error
            self._path = path
        return self._open

    def describe(self) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for path, promised in self.files.items():
            file = self._file(path)
            names = set(file.keys())
            _compare_with_index(path, promised, names)
            for name in names:
                part = file.get_slice(name)
                dtype = part.get_dtype()
                found[name] = TensorInfo(tuple(part.get_shape()), FLOATS.get(dtype), path, dtype)
                self._where[name] = path
        self.close()
        return found

    def read(self, name: str, where: tuple[slice, ...]) -> torch.Tensor:
        return self._file(self._where[name]).get_slice(name)[where]

    def close(self) -> None:
        self._open = self._path = None


class _Pickles:
    """`.bin` files through the restricted unpickler, which builds tensors and refuses everything else."""

    def __init__(self, files: Mapping[Path, set[str] | None]) -> None:
        self.files, self._path = files, None  # type: tuple[Any, Any]
        self._held: dict[str, torch.Tensor] = {}
        self._where: dict[str, Path] = {}

    def _file(self, path: Path) -> dict[str, torch.Tensor]:
        if path != self._path:
            self.close()
            try:
                held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except pickle.UnpicklingError as error:
                raise UserError(
                    f"{path}: a pickle that holds more than tensors, which could run code; convert the model to "
                    "safetensors where you trust it"
                ) from error
            except (RuntimeError, OSError, EOFError, ValueError) as error:
                raise UserError(f"{path}: truncated, or not a PyTorch file; download it again") from error
            if not isinstance(held, dict) or not all(isinstance(t, torch.Tensor) for t in held.values()):
                raise UserError(f"{path}: holds something else than named tensors; convert the model to safetensors")
            self._held, self._path = held, path
        return self._held

    def describe(self) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for path, promised in self.files.items():
            held = self._file(path)
            _compare_with_index(path, promised, set(held))
            for name, tensor in held.items():
                dtype = tensor.dtype if tensor.dtype in FLOATS.values() else None
                found[name] = TensorInfo(tuple(tensor.shape), dtype, path, str(tensor.dtype).removeprefix("torch."))
                self._where[name] = path
        self.close()
        return found

    def read(self, name: str, where: tuple[slice, ...]) -> torch.Tensor:
        return self._file(self._where[name])[name][where]

    def close(self) -> None:
        self._held, self._path = {}, None
