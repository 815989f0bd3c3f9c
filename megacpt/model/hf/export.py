"""Export: a torch_dist checkpoint to a Hugging Face folder, tensor by tensor and file by file.

Every process writes its share of the files; the folder appears whole, under its name, when all are written.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megacpt.config.architecture import Architecture
from megacpt.errors import UserError
from megacpt.files import disk_errors, sync_directory, write_json, write_text
from megacpt.model.hf.config_json import config_for
from megacpt.model.hf.rows import places
from megacpt.model.hf.source import COMPANIONS
from megacpt.model.hf.stored import StoredTensors
from megacpt.model.hf.table import Family, Home

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


@dataclass(frozen=True)
class Ranks:
    """This process among those that export together; `barrier` waits for all."""

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], object] = field(default=lambda: None)


def check_output(output: Path) -> None:
    """Refuse to mix an export with what is there.

    Raises:
        UserError: the folder exists and is not empty.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"{output}: already there; choose another --output or remove it")


def export_model(job: Export, ranks: Ranks = Ranks(), report: Callable[[int], object] = lambda count: None) -> None:
    """Write the folder; `report` is called with the parameters of every tensor written.

    Raises:
        UserError: the checkpoint lacks a tensor or is damaged, or the disk is full; then nothing is left behind.
    """
    check_output(job.output)
    stored = StoredTensors(job.checkpoint)
    homes = job.family.tensors(job.architecture)
    for home in homes.values():
        _check_shape(stored, home, job)
    dtype = job.dtype or stored.dtype(next(iter(homes.values())).weight.key)
    files = plan_files(homes, dtype.itemsize, job.shard_bytes)
    partial = job.output.with_name(f".{job.output.name}.partial")
    with disk_errors(job.output):
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        ranks.barrier()
        try:
            for number, (file, names) in enumerate(files.items()):
                if number % ranks.world_size == ranks.rank:
                    _write_file(partial / file, names, homes, stored, dtype, job, report)
            ranks.barrier()
            if ranks.rank == 0:
                _write_rest(partial, files, homes, dtype, job)
                if job.output.is_dir():
                    job.output.rmdir()
                os.rename(partial, job.output)
                sync_directory(job.output.parent)
            ranks.barrier()
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


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
    path: Path,
    names: Sequence[str],
    homes: Mapping[str, Home],
    stored: StoredTensors,
    dtype: torch.dtype,
    job: Export,
    report: Callable[[int], object],
) -> None:
    import safetensors.torch

    tensors = {}
    for name, tensor in read_tensors({name: homes[name] for name in names}, stored, job.architecture):
        tensors[name] = tensor.to(dtype).contiguous()
        report(tensor.numel())
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    # The library makes files that only their owner may read.
    path.chmod(path.parent.stat().st_mode & 0o666)
    sync_directory(path)


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


def _write_rest(
    folder: Path, files: Mapping[str, Sequence[str]], homes: Mapping[str, Home], dtype: torch.dtype, job: Export
) -> None:
    if len(files) > 1:
        total = sum(int(torch.Size(home.shape).numel()) for home in homes.values()) * dtype.itemsize
        weight_map = {name: file for file, names in files.items() for name in names}
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
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


def copy_companions(source: Path | None, folder: Path, skip: Sequence[str] = ()) -> None:
    """Copy the small files of a Hugging Face folder."""
    for name in COMPANIONS if source is not None else ():
        assert source is not None
        if name not in skip and (source / name).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def model_card(base: str | None, state: Mapping[str, Any] | None, checkpoint: Path, version: str) -> str:
    """README.md of an exported model: where its weights come from.

    Args:
        state: what megacpt.json in the checkpoint holds, or None where nothing was trained.
    """
    front = {"library_name": "transformers", "tags": ["megacpt", "continual-pretraining"]}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", "# Model card", ""]
    lines += [f"Written by megacpt {version} from checkpoint `{checkpoint.name}`.", "", "| what | value |", "|---|---|"]
    lines += [f"| base model | {base or 'none: trained from fresh weights'} |"]
    if state is None or not state["iteration"]:
        return "\n".join([*lines, "| training | none: the base model's weights |", ""])
    lines += [
        f"| steps | {state['iteration']:,} |",
        f"| samples | {state['consumed_samples']:,} |",
        f"| data fingerprint | `{state['data']}` |",
    ]
    lines += [f"| tokens of {name} | {count:,} |" for name, count in state["tokens_by_source"].items()]
    return "\n".join([*lines, ""])
