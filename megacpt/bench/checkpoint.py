"""Checkpoints of one rank, written and read: megatron-core's sharded format as we drive it, beside torch.save.

A checkpoint that does not give back the bits that went in has no speed.
"""

from collections.abc import Sequence
from pathlib import Path

from megacpt.bench.checkpoint_contestant import FORMAT, Result
from megacpt.bench.rows import OURS, Recorder
from megacpt.bench.train import cases
from megacpt.bench.train_case import run_module, write_case
from megacpt.errors import UserError
from megacpt.files import read_json


def measure(recorder: Recorder, names: Sequence[str], dtype: str, work: Path) -> None:
    """Rows of these of `train.cases`.

    Raises:
        UserError: a process fails, or what was read is not what was written.
    """
    for name in names:
        folder, case = work / f"checkpoint-{name}", cases()[name]
        config = write_case(case, folder, dtype, steps=1)
        run_module("megacpt.bench.checkpoint_contestant", config, folder / "result.json")
        found = Result(**read_json(folder / "result.json", FORMAT))
        if not found.same:
            raise UserError(f"{case.name}: the checkpoint gave back other weights than went in: no speed is told")
        title = f"{case.name}, {dtype}, weights and optimizer"
        size = found.ours_bytes / 1e9
        recorder.add("checkpoint", title, OURS, size, "GB on disk")
        recorder.add("checkpoint", title, OURS, size / found.ours_save, "GB/s saved", "synced; the step waits for it")
        recorder.add("checkpoint", title, OURS, size / found.ours_load, "GB/s loaded", "from the page cache")
        size = found.torch_bytes / 1e9
        recorder.add("checkpoint", title, "torch.save", size, "GB on disk")
        recorder.add("checkpoint", title, "torch.save", size / found.torch_save, "GB/s saved", "synced, one file")
        recorder.add("checkpoint", title, "torch.save", size / found.torch_load, "GB/s loaded", "from the page cache")
