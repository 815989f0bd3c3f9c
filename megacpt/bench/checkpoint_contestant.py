"""A checkpoint written and read, ours and torch.save's.

`python -m megacpt.bench.checkpoint_contestant CONFIG RESULT`
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megacpt.bench.contestant import Stopwatch
from megacpt.config.load import load_config
from megacpt.files import write_json
from megacpt.runtime.compiler import load_megatron_core
from megacpt.runtime.setup import quiet_third_parties, setup, teardown

if TYPE_CHECKING:
    from megacpt.train.job import Job

FORMAT = "megacpt checkpoint contestant 1"


@dataclass
class Result:
    """Bytes on disk and seconds, ours and torch.save's; `same`: whether what was read is what was written."""

    ours_bytes: int
    ours_save: float
    ours_load: float
    torch_bytes: int
    torch_save: float
    torch_load: float
    same: bool
    format: str = FORMAT


def timed(work: Callable[[], object]) -> float:
    """Wall seconds of a call."""
    watch = Stopwatch()
    work()
    return watch.lap()


def weights(job: "Job") -> list[torch.Tensor]:
    """A copy of this rank's parameters."""
    return [parameter.detach().clone() for chunk in job.chunks for parameter in chunk.parameters()]


def torch_save(job: "Job", path: Path) -> None:
    """The same state in one file, synced as ours is."""
    with open(path, "wb") as handle:
        torch.save([[chunk.state_dict() for chunk in job.chunks], job.optimizer.state_dict()], handle)
        handle.flush()
        os.fsync(handle.fileno())


def main() -> None:
    """One step, then both ways out and in."""
    config_path, result_path = map(Path, sys.argv[1:])
    quiet_third_parties()
    load_megatron_core()
    from megacpt.train.build import build_job
    from megacpt.train.checkpoint import iteration_folder, load_all
    from megacpt.train.planning import make_plan

    config = load_config(config_path, [])
    plan = make_plan(config, 1, on_gpu=torch.cuda.is_available())
    job = build_job(plan, setup(plan.layout, config.train.seed, config.runtime.threads))
    job.step(job.next_batch(), plan.learning_rate(1))
    before = weights(job)
    root = Path(config.save.dir) / "checkpoints"
    ours_save = timed(job.save)
    folder = iteration_folder(root, 1)
    for parameter in (p for chunk in job.chunks for p in chunk.parameters()):
        parameter.data.zero_()
    ours_load = timed(lambda: load_all(folder, job.chunks, job.optimizer, 1))
    same = all(map(torch.equal, before, weights(job)))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    # The disk need not hold both, nor the GPU its state twice.
    shutil.rmtree(root)
    single = Path(config.save.dir) / "state.pt"
    torch_seconds = timed(lambda: torch_save(job, single))
    loading = timed(lambda: torch.load(single, map_location="cpu", weights_only=False))
    result = Result(size, ours_save, ours_load, single.stat().st_size, torch_seconds, loading, same)
    write_json(result_path, asdict(result))
    teardown()


if __name__ == "__main__":
    main()
