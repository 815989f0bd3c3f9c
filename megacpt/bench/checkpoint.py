"""Checkpoints of one rank, written and read: megatron-core's sharded format as we drive it, beside torch.save.

A checkpoint that does not give back the bits that went in has no speed.
"""

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megacpt.bench.checkpoint_contestant import FORMAT, Result
from megacpt.bench.processes import TimeUp, run_module
from megacpt.bench.rows import OURS, TIME_UP, Recorder
from megacpt.bench.train import cases, chosen
from megacpt.bench.train_case import TrainCase, write_case
from megacpt.errors import UserError
from megacpt.files import read_json

SMALLEST = "smollm2-135m"
"""A case of every device."""


def usual_cases() -> list[str]:
    """This device's, but on a GPU none whose state is larger than a small disk: 18 bytes a parameter."""
    return [SMALLEST, "1b"] if torch.cuda.is_available() else chosen(None)


def measure(recorder: Recorder, names: Sequence[str], dtype: str, work: Path, deadline: float = math.inf) -> None:
    """Rows of these of `train.cases`. One case at a time is on disk. `deadline` as in `train.Run`.

    Raises:
        UserError: a process fails, or what was read is not what was written.
    """
    for name in names:
        case, folder = cases()[name], work / f"checkpoint-{name}"
        title = f"{case.name}, {dtype}, weights and optimizer"
        try:
            found = _run(case, folder, dtype, deadline)
        except TimeUp:
            recorder.add("checkpoint", title, OURS, 0, "GB/s saved", TIME_UP)
            continue
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if not found.same:
            raise UserError(f"{case.name}: the checkpoint gave back other weights than went in: no speed is told")
        size = found.ours_bytes / 1e9
        recorder.add("checkpoint", title, OURS, size, "GB on disk")
        recorder.add("checkpoint", title, OURS, size / found.ours_save, "GB/s saved", "synced; the step waits for it")
        recorder.add("checkpoint", title, OURS, size / found.ours_load, "GB/s loaded", "from the page cache")
        size = found.torch_bytes / 1e9
        recorder.add("checkpoint", title, "torch.save", size, "GB on disk")
        recorder.add("checkpoint", title, "torch.save", size / found.torch_save, "GB/s saved", "synced, one file")
        note = "from the page cache, into the host's memory"
        recorder.add("checkpoint", title, "torch.save", size / found.torch_load, "GB/s loaded", note)


def _run(case: TrainCase, folder: Path, dtype: str, deadline: float) -> Result:
    if time.monotonic() >= deadline:
        raise TimeUp(TIME_UP)
    config = write_case(case, folder, dtype, 1, deadline - time.monotonic())
    path = folder / "result.json"
    run_module("megacpt.bench.checkpoint_contestant", config, path, limit=deadline - time.monotonic())
    return Result(**read_json(path, FORMAT))
