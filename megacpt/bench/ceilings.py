"""What this device does at best, measured in the same run as the rows that are quoted against it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from megacpt.bench.contestant import Stopwatch

CALLS = 4
"""Between two events."""


@dataclass(frozen=True)
class Ceilings:
    """Bytes/s of a device copy (read and write both counted), and FLOP/s of a large square matmul."""

    copy: float
    matmul: float


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Median wall seconds of a call on the CPU; a first call is not counted."""
    work()
    watch = Stopwatch()
    found = []
    for _ in range(repeats):
        watch.lap()
        work()
        found.append(watch.lap())
    return median(found)


def seconds_between_events(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    """Median seconds on the GPU of one of several calls, by events before and after all: launching them is not seen."""
    for call in calls:
        call()
    found = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        # Outputs that share memory would be in the cache.
        kept = [call() for call in calls]
        ended.record()
        ended.synchronize()
        found.append(began.elapsed_time(ended) / 1e3 / len(calls))
        del kept
    return median(found)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """On random data: zeros draw less power, and so run at higher clocks than training does. No memory stays taken."""
    try:
        return _measure(device, dtype)
    finally:
        torch.cuda.empty_cache()


def _measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    on_gpu = device.type == "cuda"
    side, size, repeats = (8192, 1 << 30, 20) if on_gpu else (1536, 1 << 26, 5)

    def seconds(work: Callable[[], object]) -> float:
        return seconds_between_events([work] * CALLS, repeats) if on_gpu else seconds_of(work, repeats)

    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, device=device, dtype=dtype, generator=generator) for _ in range(2))
    out = torch.empty_like(left)
    matmul = 2 * side**3 / seconds(lambda: torch.matmul(left, right, out=out))
    source = torch.randn(size // 4, device=device, generator=generator)
    target = torch.empty_like(source)
    copy = 2 * size / seconds(lambda: target.copy_(source))
    return Ceilings(copy, matmul)
