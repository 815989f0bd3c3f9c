"""A GGUF file of the Llama architecture, read slice by slice: memory-mapped, and dequantised row by row where needed.

Packages gguf (names, formats, dequantisation) and transformers (the configuration, and which rows llama.cpp permuted)
decide what the file means; here is only which part of it is wanted.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megacpt.errors import UserError
from megacpt.model.hf.config_json import architecture_from
from megacpt.model.hf.families import family_of
from megacpt.model.hf.weight_files import TensorInfo

ROPE_FACTORS = "rope_freqs.weight"
CHUNK = 1 << 20
"""Values that are dequantised at once."""


class _Stored(NamedTuple):
    """A tensor in the file: its name there, gguf's type, the shape of its values, and where its bytes lie."""

    name: str
    type: Any
    shape: tuple[int, ...]
    offset: int
    item: np.dtype[Any]
    items: tuple[int, ...]


class GGUF:
    """One file. Quantised blocks lie along a row, so that rows can be had one by one; columns are cut afterwards."""

    def __init__(self, path: Path) -> None:
        self.path = path
        transformers = _transformers(path)
        try:
            config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:
            # gguf and transformers raise whatever their parsers meet.
            raise UserError(f"{path}: truncated, or not a GGUF file of a known architecture ({error})") from error
        self.config: dict[str, Any] = config.to_dict()
        self.config.pop("quantization_config", None)
        self.config["architectures"] = [_architecture(config)]
        self._tensors: dict[str, _Stored] = {}
        self._order: dict[str, np.ndarray] = {}

    def describe(self) -> dict[str, TensorInfo]:
        import gguf

        try:
            reader = gguf.GGUFReader(self.path)
        except Exception as error:
            raise UserError(f"{self.path}: truncated or damaged ({error}); download it again") from error
        theirs, found = self._names(), {}
        for entry in reader.tensors:
            shape = tuple(int(size) for size in reversed(entry.shape))
            stored = _Stored(
                entry.name, entry.tensor_type, shape, int(entry.data_offset), entry.data.dtype, entry.data.shape
            )
            if entry.name == ROPE_FACTORS:
                self._refuse_scaling(stored)
                continue
            name = theirs.get(entry.name, entry.name)
            self._tensors[name] = stored
            kind = torch.float32 if self._can_dequantise(stored) else None
            found[name] = TensorInfo(shape, kind, self.path, stored.type.name)
        self._processor = _processor(str(reader.get_field("general.architecture").contents()), self.config)
        return found

    def _names(self) -> dict[str, str]:
        """Hugging Face's names by GGUF's."""
        import gguf

        where = str(self.path)
        architecture = architecture_from(self.config, where)
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, architecture.num_layers)
        found = {}
        for name in family_of(self.config, where).tensors(architecture):
            stem, _, kind = name.rpartition(".")
            found[f"{known.get_name(stem)}.{kind}"] = name
        return found

    def _mapped(self, stored: _Stored) -> np.ndarray:
        """A tensor's bytes, mapped for as long as the result lives: what has been read counts as memory no longer."""
        return np.memmap(self.path, stored.item, "r", stored.offset, stored.items)

    def _refuse_scaling(self, stored: _Stored) -> None:
        if (self._mapped(stored) != 1).any():
            raise UserError(
                f"{self.path}: holds RoPE scaling as {ROPE_FACTORS}, which transformers does not read out of GGUF "
                "files; use the model's safetensors"
            )

    def _can_dequantise(self, stored: _Stored) -> bool:
        import gguf

        data = self._mapped(stored)
        try:
            gguf.dequantize(data if data.ndim == 1 else data[:1], stored.type)
        except NotImplementedError:
            return False
        return True

    def read(self, name: str, where: tuple[slice, ...]) -> torch.Tensor:
        import gguf

        stored = self._tensors[name]
        data = self._mapped(stored)
        if len(where) == 1:
            return torch.from_numpy(np.array(gguf.dequantize(data, stored.type)[where]))
        rows, columns = self._rows(name)[where[0]], where[1]
        width = stored.shape[1]
        found = np.empty((len(rows), len(range(width)[columns])), dtype=np.float32)
        step = max(1, CHUNK // width)
        for start in range(0, len(rows), step):
            values = gguf.dequantize(data[rows[start : start + step]], stored.type)
            found[start : start + step] = values[:, columns]
        return torch.from_numpy(found)

    def _rows(self, name: str) -> np.ndarray:
        """The file's row of each row, told by transformers: its own undoing of llama.cpp's permutation, of numbers."""
        if name not in self._order:
            stored = self._tensors[name]
            numbers = np.arange(stored.shape[0])[:, None]
            self._order[name] = self._processor.process(weights=numbers, name=stored.name).weights[:, 0]
        return self._order[name]

    def close(self) -> None:
        self._order = {}


def _processor(architecture: str, config: dict[str, Any]) -> Any:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)


def write_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer that a GGUF file holds as Hugging Face's files."""
    folder.mkdir(parents=True, exist_ok=True)
    _transformers(path).AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def _architecture(config: Any) -> str:
    named = getattr(config, "architectures", None)
    return (
        named[0]
        if named
        else {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}.get(config.model_type, config.model_type)
    )


def _transformers(path: Path) -> Any:
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise UserError(
            f"{path}: GGUF files are read through transformers, and {error.name} is not installed; "
            "pip install 'megacpt[hf]'"
        ) from error
    return transformers
