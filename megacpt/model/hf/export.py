"""Export: a torch_dist checkpoint to a Hugging Face folder, tensor by tensor and file by file.

Every process writes its share of the files; the folder appears whole, under its name, when all are written. A file too
is whole or not there, so that the same command after an interruption writes only those that are missing.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import megacpt
from megacpt.config.architecture import Architecture
from megacpt.errors import DiskError, UserError
from megacpt.files import disk_errors, exclusive, sync_directory, write_json, write_text
from megacpt.model.hf.companions import copy_companions
from megacpt.model.hf.config_json import config_for
from megacpt.model.hf.rows import places
from megacpt.model.hf.stored import StoredTensors
from megacpt.model.hf.table import Family, Home
from megacpt.model.hf.unfinished import RECORD, Ranks, Report, describe_files, lock_of, take_up
from megacpt.model.hf.weight_files import Safetensors

SHARD_BYTES = 5_000_000_000
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Export:
    """What to write.

    Attributes:
        checkpoint: an iter_* folder.
        output: the folder to make.
        base: config.json to start from, or None to write a new one.
        companions: folder with generation configuration and tokenizer files, or None where there is none.
        dtype: of the weights; None keeps the checkpoint's.
        shard_bytes: largest file, unless a single tensor is larger.
        card: the text of README.md.
    """

    checkpoint: Path
    output: Path
    family: Family
    architecture: Architecture
    base: Mapping[str, Any] | None
    companions: Path | None
    card: str
    dtype: torch.dtype | None = None
    shard_bytes: int = SHARD_BYTES


def check_output(output: Path) -> None:
    """Refuse to mix an export with what is there.

    Raises:
        UserError: the folder exists and is not empty.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"{output}: already there; choose another --output or remove it")


@dataclass(frozen=True)
class _Contents:
    """The tensors, their dtype, and the weight files with the tensors of each."""

    homes: dict[str, Home]
    dtype: torch.dtype
    files: dict[str, list[str]]

    def parameters(self, files: Iterable[str]) -> int:
        """Number of parameters in some of the files."""
        return sum(torch.Size(self.homes[name].shape).numel() for file in files for name in self.files[file])


def export_model(job: Export, ranks: Ranks, report: Report) -> None:
    """Write the folder. Files that an interrupted export of the same job finished are kept, the others written.

    Raises:
        UserError: the checkpoint lacks a tensor or is damaged (then nothing is left behind), another process is
            exporting there, or the disk is full (then what is finished stays).
    """
    check_output(job.output)
    stored = StoredTensors(job.checkpoint)
    contents = _contents(job, stored)
    partial = job.output.with_name(f".{job.output.name}.partial")
    with ExitStack() as held:

        def begin() -> list[str]:
            if ranks.rank:
                return []
            held.enter_context(exclusive(lock_of(partial), f"the export to {job.output}"))
            check_output(job.output)
            take_up(partial, _record(job, contents))
            return _finished(partial, contents)

        def write() -> None:
            for number, file in enumerate(missing):
                if number % ranks.world_size == ranks.rank:
                    _write_file(partial / file, contents, stored, job, report.done)

        def finish() -> None:
            if ranks.rank == 0:
                with disk_errors(job.output):
                    _write_rest(partial, contents, job)
                    _publish(partial, job.output)

        finished = ranks.together(begin)[0]
        missing = [file for file in contents.files if file not in finished]
        if finished:
            sentence = f"resuming: {len(finished)} of {len(contents.files)} weight files of {job.output} are finished"
            report.resumed(contents.parameters(finished) // ranks.world_size, sentence)
        try:
            ranks.together(write)
            ranks.together(finish)
        except DiskError:
            raise
        except UserError:
            if ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _contents(job: Export, stored: StoredTensors) -> _Contents:
    homes = job.family.tensors(job.architecture)
    for home in homes.values():
        _check_shape(stored, home, job)
    dtype = job.dtype or stored.dtype(next(iter(homes.values())).weight.key)
    return _Contents(homes, dtype, plan_files(homes, dtype.itemsize, job.shard_bytes))


def _record(job: Export, contents: _Contents) -> dict[str, Any]:
    """All that the bytes of the weight files depend on; the small files are written anew in any case."""
    return {
        "versions": {module.__name__: module.__version__ for module in (megacpt, torch, safetensors)},
        "checkpoint": describe_files(path for path in job.checkpoint.rglob("*") if path.is_file()),
        "family": job.family.architecture,
        "architecture": asdict(job.architecture),
        "dtype": DTYPE_NAMES[contents.dtype],
        "files": contents.files,
    }


def _finished(partial: Path, contents: _Contents) -> list[str]:
    """Planned files that are there and whole; whatever else the folder holds, but for the record, is removed."""
    found = []
    with disk_errors(partial):
        for path in sorted(partial.iterdir()):
            names = contents.files.get(path.name, ())
            if names and _header(path) == {name: (contents.dtype, contents.homes[name].shape) for name in names}:
                found.append(path.name)
            elif path.name != RECORD:
                path.unlink()
    return found


def _header(path: Path) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """Dtype and shape of each tensor in a safetensors file; nothing where it is no whole one."""
    try:
        described = Safetensors({path: None}).describe()
    except UserError:
        return {}
    return {name: (info.dtype, info.shape) for name, info in described.items()}


def _publish(partial: Path, output: Path) -> None:
    (partial / RECORD).unlink()
    if output.is_dir():
        output.rmdir()
    os.rename(partial, output)
    sync_directory(output.parent)


def _check_shape(stored: StoredTensors, home: Home, job: Export) -> None:
    """Whether the checkpoint's tensor is at least as large as what is wanted of it (padding makes it larger)."""
    found = stored.shape(home.weight.key)
    rows = sum(span.rows for span in home.weight.layout(job.architecture))
    layers = (job.architecture.num_layers,) if home.weight.in_layer else ()
    exact, padded = (*layers, rows, *home.shape[1:]), "vocabulary" in home.weight.parts[0].shape
    if found != exact and not (padded and found[1:] == exact[1:] and found[0] > rows):
        raise UserError(
            f"{job.checkpoint}: tensor {home.weight.key} has shape {list(found)}, the configuration asks for "
            f"{list(exact)}; give the configuration that the checkpoint was trained with"
        )


def plan_files(homes: Mapping[str, Home], itemsize: int, limit: int) -> dict[str, list[str]]:
    """File names and the tensors in each, filled in order up to `limit` bytes."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, home in homes.items():
        own = int(torch.Size(home.shape).numel()) * itemsize
        if groups[-1] and size + own > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += own
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _write_file(
    path: Path, contents: _Contents, stored: StoredTensors, job: Export, done: Callable[[int], object]
) -> None:
    tensors = {}
    homes = {name: contents.homes[name] for name in contents.files[path.name]}
    for name, tensor in read_tensors(homes, stored, job.architecture):
        tensors[name] = tensor.to(contents.dtype).contiguous()
        done(tensor.numel())
    with disk_errors(job.output):
        _save_atomically(tensors, path)


def _save_atomically(tensors: dict[str, torch.Tensor], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
        # The library makes files that only their owner may read.
        temporary.chmod(path.parent.stat().st_mode & 0o666)
        sync_directory(temporary)
        os.rename(temporary, path)
    except safetensors.SafetensorError as error:
        # The library passes the system's errors on as text.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def read_tensors(
    homes: Mapping[str, Home], stored: StoredTensors, architecture: Architecture
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face tensors out of a checkpoint, in order; a fused tensor is read once for parts that follow another."""
    held: tuple[Any, torch.Tensor] | None = None
    for name, home in homes.items():
        identity = (home.weight.key, home.layer)
        layout = home.weight.layout(architecture)
        if held is None or held[0] != identity:
            box = (sum(span.rows for span in layout), *home.shape[1:])
            if home.layer is None:
                held = identity, stored.read(home.weight.key, (0,) * len(box), box)
            else:
                held = identity, stored.read(home.weight.key, (home.layer, *(0 for _ in box)), (1, *box))[0]
        tensor = torch.empty(home.shape, dtype=held[1].dtype)
        for place in places(layout, home.part):
            tensor[place.part_start : place.part_start + place.stop - place.start] = held[1][place.start : place.stop]
        yield name, tensor


def _write_rest(folder: Path, contents: _Contents, job: Export) -> None:
    files, dtype = contents.files, contents.dtype
    if len(files) > 1:
        metadata = {"total_size": contents.parameters(files) * dtype.itemsize}
        weight_map = {name: file for file, names in files.items() for name in names}
        write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    config = config_for(job.architecture, job.base, job.family)
    # transformers 5 writes dtype, 4 torch_dtype; both read the latter.
    config.pop("dtype", None)
    write_json(folder / "config.json", config | {"torch_dtype": DTYPE_NAMES[dtype]})
    copy_companions(job.companions, folder, skip=("config.json",))
    if not (folder / "generation_config.json").is_file():
        ids = {
            key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None
        }
        write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    write_text(folder / "README.md", job.card)
