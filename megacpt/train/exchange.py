"""Hugging Face folder to checkpoint and back, on any number of ranks: for tools/convert.py and `save.hf_every`."""

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megacpt
from megacpt.config.architecture import Architecture
from megacpt.config.check import check_layout
from megacpt.config.tree import Model
from megacpt.errors import UserError
from megacpt.files import exclusive, write_json
from megacpt.model.build import BuildOptions, build_chunks, transformer_config
from megacpt.model.hf.companions import model_card
from megacpt.model.hf.export import SHARD_BYTES, Export, check_output, export_model
from megacpt.model.hf.families import family_for, family_of
from megacpt.model.hf.fill import fill_weights
from megacpt.model.hf.gate import Verdict, check_import
from megacpt.model.hf.source import read_config
from megacpt.model.hf.unfinished import Ranks, Report, describe_files, lock_of, take_up
from megacpt.runtime.environment import version_of, versions
from megacpt.train.checkpoint import TRACKER, find_checkpoint, read_state, save_weights
from megacpt.train.origin import Origin, find_tokenizer, origin_of, provenance
from megacpt.train.plan import fingerprint

PASSED = "gate.json"
"""In the hidden folder of an import: the verdict of the gate that it has passed."""
GATE_SHAPE = (4, 64)
"""Sequences of the gate, and tokens in each."""
GATE_TEXT = (
    "The patient was given metformin at a dose of 500 mg twice daily. After twelve weeks her fasting glucose had "
    "fallen from 9.8 to 6.9 mmol/L, and no adverse events were reported in either arm of the trial. ",
    "It rained for most of the night, and by morning the river had reached the lower meadow. Nobody in the village "
    'could remember a spring like it; "Not since my father was a boy," said the miller. ',
    "def mean(values):\n    if not values:\n        raise ValueError('no values')\n"
    "    return sum(values) / len(values)\n\n"
    "assert mean([1, 2, 3]) == 2  # integers divide into a float\n",
    "Let f be continuous on [a, b] and differentiable on (a, b). Then there is a point c in (a, b) such that "
    "f'(c) = (f(b) - f(a)) / (b - a). Die Größe der Änderung hängt nur von c ab. ",
)
"""Prose on medicine and on weather, code, and mathematics with some German: what the tool's gate reads."""


@dataclass(frozen=True)
class Conversion:
    """What to do with the model beside importing it. `gate`: compare with transformers first."""

    output: Path
    dtype: torch.dtype | None = None
    gate: bool = True


def import_model(origin: Origin, model: Model, job: Conversion, report: Report) -> tuple[Path, Verdict | None]:
    """Build the model on the process groups that are up, fill it, pass the gate, save its weights as a checkpoint.

    A verdict of the gate is noted until the checkpoint is whole: after an interruption, the same command on the same
    source fills and saves again, but does not repeat the gate.

    Raises:
        UserError: the layout does not divide the model, the gate refuses, the disk is full, or another process is
            importing there; no part of a checkpoint is left behind.
    """
    source, architecture, ranks = origin.source, origin.architecture, _ranks()
    assert source is not None
    options = BuildOptions(job.dtype or source.dtype, restart_positions=False)
    noted = job.output / ".import.partial"
    with ExitStack() as held:

        def begin() -> Verdict | None:
            check_import_layout(origin, model, job.output)
            if ranks.rank:
                return None
            held.enter_context(exclusive(lock_of(noted), f"the import to {job.output}"))
            check_import_layout(origin, model, job.output)
            if not job.gate:
                return None
            held.callback(_remove_unless_passed, noted)
            return _passed(noted) if take_up(noted, _import_record(origin, model, options.dtype)) else None

        verdict = ranks.together(begin)[0]
        chunks = build_chunks(architecture, model, transformer_config(architecture, model, options), options)
        ranks.together(lambda: fill_weights(chunks, source, report.done))
        if verdict is not None:
            report.resumed(0, f"resuming: the weights of {source.folder} have passed the gate, which is not repeated")
        elif job.gate:
            verdict = check_import(chunks, source, architecture, gate_tokens(origin))
            if ranks.rank == 0:
                write_json(noted / PASSED, asdict(verdict))
        folder = save_weights(job.output, chunks, lambda target: origin.write(target, architecture))
        source.close()
        if ranks.rank == 0:
            shutil.rmtree(noted, ignore_errors=True)
    return folder, verdict


def _import_record(origin: Origin, model: Model, dtype: torch.dtype) -> dict[str, Any]:
    """All that the verdict of the gate depends on."""
    return {
        "versions": versions() | {name: version_of(name) for name in ("transformers", "gguf", "safetensors")},
        "source": describe_files(p for p in origin.folder.iterdir() if p.is_file() and not p.name.startswith(".")),
        "architecture": asdict(origin.architecture),
        "dtype": str(dtype),
        "layout": [dist.get_world_size(), model.tensor_model_parallel_size, model.pipeline_model_parallel_size],
        "device": torch.cuda.get_device_name() if dist.get_backend() == "nccl" else "CPU",
    }


def _passed(noted: Path) -> Verdict | None:
    """The verdict noted there; a gate that was interrupted, or refused, has left none."""
    try:
        return Verdict(**json.loads((noted / PASSED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _remove_unless_passed(noted: Path) -> None:
    if not (noted / PASSED).is_file():
        shutil.rmtree(noted, ignore_errors=True)


def check_import_layout(origin: Origin, model: Model, output: Path) -> None:
    """Refuse what cannot be imported, before processes meet.

    Raises:
        UserError: TP or PP does not divide the model, or `output` holds checkpoints already.
    """
    check_layout(model, origin.architecture)
    if (output / TRACKER).exists() or output.is_file():
        raise UserError(f"{output}: already there; choose another --output or remove it")


def gate_tokens(origin: Origin) -> torch.Tensor:
    """Real text in the model's own tokens, int64 [4, 64]; seeded random tokens where the folder has no tokenizer."""
    tokenizer = find_tokenizer(origin.folder)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, origin.architecture.vocab_size, GATE_SHAPE, generator=generator)
    sequences, length = GATE_SHAPE
    return torch.tensor([_repeated(tokenizer.encode(GATE_TEXT[i]).tolist(), length) for i in range(sequences)])


def _repeated(ids: Sequence[int], length: int) -> list[int]:
    return [ids[position % len(ids)] for position in range(length)]


@dataclass(frozen=True)
class HFOutput:
    """How to write a Hugging Face folder; `tokenizer` is a folder with files instead of the checkpoint's own."""

    folder: Path
    dtype: torch.dtype | None = None
    tokenizer: Path | None = None
    shard_bytes: int = SHARD_BYTES


def export_checkpoint(checkpoint: Path, output: HFOutput, report: Report) -> None:
    """Write a checkpoint as a Hugging Face folder, on all ranks of the process group or on this process alone.

    Raises:
        UserError: the checkpoint says nothing of its shape, lacks a tensor or is damaged; the folder is there already.
    """
    check_output(output.folder)
    origin, state = origin_of(checkpoint), read_state(checkpoint)
    architecture = architecture_in(checkpoint)
    config = read_config(origin.folder) if origin is not None else None
    companions = output.tokenizer or (origin.folder if origin is not None else None)
    known = None if state is None else asdict(state) | {"data": fingerprint(state.mixture)}
    job = Export(
        checkpoint=checkpoint,
        output=output.folder,
        family=family_for(architecture) if config is None else family_of(config, str(checkpoint)),
        architecture=architecture,
        base=config,
        companions=companions,
        card=model_card(
            provenance(origin.folder if origin is not None else None), known, checkpoint, megacpt.__version__
        ),
        dtype=output.dtype,
        shard_bytes=output.shard_bytes,
    )
    export_model(job, _ranks(), report)


def _ranks() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size(), _gather) if dist.is_initialized() else Ranks()


def _gather(value: Any) -> list[Any]:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def architecture_in(checkpoint: Path) -> Architecture:
    """The shape of a checkpoint's model: of the model it began from, or as megacpt noted it.

    Raises:
        UserError: the checkpoint says nothing of it.
    """
    origin, state = origin_of(checkpoint), read_state(checkpoint)
    if origin is not None:
        return origin.architecture
    if state is None:
        raise UserError(
            f"{checkpoint}: says nothing of the model's shape (no hf/config.json, no megacpt.json); name a "
            "checkpoint that megacpt wrote"
        )
    noted: dict[str, Any] = {f.name: state.identity[f"model.{f.name}"] for f in fields(Architecture)}
    return Architecture(**noted)


def checkpoint_at(place: Path) -> Path:
    """The checkpoint that a command line names.

    Raises:
        UserError: there is none.
    """
    folder = find_checkpoint(place)
    if folder is None:
        raise UserError(f"{place}: no checkpoint there; name a run, its checkpoints or an iter_* folder")
    return folder
