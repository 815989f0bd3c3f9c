"""Weights on disk, described without reading them and read slice by slice: safetensors, and `.bin` pickles of tensors.

One file is open at a time, so that no more than its mapped pages add to a process's memory.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from megacpt.errors import UserError

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Tensor types that hold weights, by their safetensors names."""


class TensorInfo(NamedTuple):
    """A tensor as its file describes it; `dtype` is None where it holds no weights (integers, fp8)."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    file: Path
    dtype_name: str


class WeightFiles(Protocol):
    def describe(self) -> dict[str, TensorInfo]: ...

    def read(self, name: str, where: tuple[slice, ...]) -> torch.Tensor: ...

    def close(self) -> None: ...


class Safetensors:
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


class Pickles:
    """`.bin` files through the restricted unpickler, which builds tensors and refuses everything else.

    Tensors are mapped, and only the pages of the slices that are wanted get read; a file in torch's format from before
    version 1.6 cannot be mapped and is read whole.
    """

    def __init__(self, files: Mapping[Path, set[str] | None]) -> None:
        self.files, self._path = files, None  # type: tuple[Any, Any]
        self._held: dict[str, torch.Tensor] = {}
        self._where: dict[str, Path] = {}

    def _file(self, path: Path) -> dict[str, torch.Tensor]:
        if path != self._path:
            self.close()
            try:
                held = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_archive(path))
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


def _is_archive(path: Path) -> bool:
    with open(path, "rb") as handle:
        return handle.read(2) == b"PK"


def _compare_with_index(path: Path, promised: set[str] | None, found: set[str]) -> None:
    if promised is not None and promised - found:
        missing = min(promised - found, key=_natural)
        raise UserError(f"{path}: tensor {missing} is missing, though the index promises it; download the file again")


def _natural(name: str) -> list[Any]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]
