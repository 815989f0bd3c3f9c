"""Training steps per second: ours beside Hugging Face Trainer and megatron-core's own specs, on the same weights and
batches, each in a process of its own, one after another on one device."""

import itertools
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from megacpt.bench.ceilings import Ceilings, measure_ceilings
from megacpt.bench.contestant import Result, read_result
from megacpt.bench.processes import TimeUp, run_module
from megacpt.bench.rows import OURS, TIME_UP, Recorder
from megacpt.bench.train_case import CPU_CASES, GPU_CASES, WARMUP, TrainCase, write_case
from megacpt.config.architecture import Architecture
from megacpt.errors import UserError
from megacpt.train.metrics import mfu

TRAINER = "megacpt.bench.train_ours"
CONTESTANTS: Mapping[str, tuple[str, ...]] = {
    OURS: (TRAINER,),
    "megatron-core's specs": (TRAINER, "--stock", "model.swiglu_fusion_impl=native", "model.rope_fusion_impl=native"),
    "Hugging Face Trainer": ("megacpt.bench.train_hf",),
}
"""Module and flags by name; ours first, since the others' losses are compared with it."""
GPU_CONTESTANTS: Mapping[str, tuple[str, ...]] = {
    f"{OURS}, FP8 tensorwise": (TRAINER, "model.fp8=hybrid", "model.fp8_recipe=tensorwise"),
    f"{OURS}, own SwiGLU": (TRAINER, "model.swiglu_fusion_impl=megacpt"),
    f"{OURS}, own RoPE": (TRAINER, "model.rope_fusion_impl=megacpt"),
    f"{OURS}, loss of hidden states": (TRAINER, "model.cross_entropy_fusion_impl=linear"),
    "HF Trainer, torch.compile": ("megacpt.bench.train_hf", "--compile"),
}
"""And on a GPU: what a CPU has not, and what a measurement has to decide (docs/parallelism.md). The slowest last."""
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
"""Of the losses of the first steps, relative: beyond it somebody trains something else, and has no speed."""


@dataclass(frozen=True)
class Run:
    """How to measure: `rounds` times each in turn, of `steps` steps, WARMUP of which are not timed."""

    steps: int
    rounds: int
    dtype: str
    deadline: float = math.inf

    @property
    def left(self) -> float:
        """Seconds until the deadline, of `time.monotonic`."""
        return self.deadline - time.monotonic()


def cases() -> Mapping[str, TrainCase]:
    """The cases of this device, by name."""
    return GPU_CASES if torch.cuda.is_available() else CPU_CASES


def usual_dtype() -> str:
    """The dtype of this device's runs."""
    return "bf16" if torch.cuda.is_available() else "fp32"


def usual_rounds() -> int:
    """How often each contestant has its turn: a shared CPU's speed drifts by more than contestants differ."""
    return 1 if torch.cuda.is_available() else 3


def chosen(names: Sequence[str] | None) -> list[str]:
    """These cases, or all of this device.

    Raises:
        UserError: there is no case of a name.
    """
    known = cases()
    if unknown := [name for name in names or [] if name not in known]:
        raise UserError(f"--cases {unknown[0]}: no such case on this device; it has {', '.join(known)}")
    return list(names or known)


def measure(recorder: Recorder, names: Sequence[str], run: Run, work: Path) -> None:
    """Rows of these cases.

    Raises:
        UserError: at the end, if ours fails. Rows tell of that, of a peer that fails, and of one with other losses.
    """
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if run.dtype == "bf16" else torch.float32
    ceilings = measure_ceilings(torch.device("cuda" if on_gpu else "cpu"), dtype)
    title = f"what the device does at best, {run.dtype}"
    recorder.add("train", title, "torch", ceilings.matmul / 1e12, "TFLOP/s", "a large square matmul, random data")
    recorder.add("train", title, "torch", ceilings.copy / 1e9, "GB/s", "a copy on the device, read and write")
    failed = []
    for name in names:
        title = f"{cases()[name].title}, {run.dtype}"
        try:
            _measure_case(recorder, cases()[name], run, work / name, ceilings)
        except TimeUp:
            recorder.add("train", title, OURS, 0, "tokens/s", TIME_UP)
        except UserError as error:
            recorder.add("train", title, OURS, 0, "tokens/s", f"did not run: {str(error)[-120:]}")
            failed.append(error)
    if failed:
        raise failed[0]


def _measure_case(recorder: Recorder, case: TrainCase, run: Run, folder: Path, ceilings: Ceilings) -> None:
    if run.left <= 0:
        raise TimeUp(TIME_UP)
    config = write_case(case, folder, run.dtype, run.steps, run.left)
    title = f"{case.title}, {run.dtype}"
    found: dict[str, list[Result]] = {}

    def tell(name: str) -> None:
        difference = _difference(found[OURS][0].losses, found[name][0].losses)
        if difference > TOLERANCE[run.dtype]:
            recorder.add("train", title, name, 0, "tokens/s", f"other losses by {difference:.1e}: no speed is told")
        else:
            _add_rows(recorder, title, name, case, found[name], ceilings)

    contestants = {**CONTESTANTS, **(GPU_CONTESTANTS if torch.cuda.is_available() else {})}
    for round_, name in itertools.product(range(run.rounds), contestants):
        if round_ and name not in found:
            continue
        try:
            result = _turn(contestants[name], config, folder, run.left)
        except TimeUp:
            if not found:
                raise
            if name not in found:
                recorder.add("train", title, name, 0, "tokens/s", TIME_UP)
        except UserError as error:
            if name == OURS:
                raise
            recorder.add("train", title, name, 0, "tokens/s", f"did not run: {str(error)[-120:]}")
            found.pop(name, None)
        else:
            found.setdefault(name, []).append(result)
        if round_ + 1 == run.rounds and name in found:
            tell(name)


def _turn(contestant: Sequence[str], config: Path, folder: Path, limit: float) -> Result:
    """One contestant's steps. Nothing is begun if `limit`, in seconds, is not positive.

    Raises:
        TimeUp: it had not ended by then, and was ended.
        UserError: it failed.
    """
    if limit <= 0:
        raise TimeUp(TIME_UP)
    module, *flags = contestant
    path = folder / "result.json"
    try:
        run_module(module, config, path, *flags, limit=limit)
        return read_result(path)
    finally:
        # The next one would go on from it.
        shutil.rmtree(folder / "run", ignore_errors=True)


def _difference(expected: Sequence[float], found: Sequence[float]) -> float:
    """The largest relative difference of the losses of the first WARMUP steps; infinite if there are none."""
    pairs = list(zip(expected, found, strict=False))[:WARMUP]
    return max((abs(one - other) / abs(one) for one, other in pairs), default=math.inf)


def _add_rows(
    recorder: Recorder, title: str, name: str, case: TrainCase, results: Sequence[Result], ceilings: Ceilings
) -> None:
    seconds = median(second for result in results for second in result.seconds[WARMUP:])
    tokens = case.global_batch_size * case.seq_length / seconds
    flops = tokens * Architecture(**case.fields).flops_per_token(case.seq_length)
    recorder.add("train", title, name, tokens, "tokens/s", "median step")
    recorder.add("train", title, name, flops / 1e12, "TFLOP/s", "causal-half formula")
    recorder.add("train", title, name, 100 * flops / ceilings.matmul, "% of the matmul rate", "measured in this run")
    share = mfu(flops / 1e12, recorder.device)
    if share is not None:
        recorder.add("train", title, name, 100 * share, "% MFU", "of the datasheet's dense bf16")
    recorder.add("train", title, name, max(result.memory for result in results) / 2**30, "GiB peak")
