"""What this device does at best, measured in the same run as the rows that are quoted against it."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from megacpt.bench.contestant import Stopwatch


@dataclass(frozen=True)
class Ceilings:
    """Bytes/s of a device copy (read and write both counted), and FLOP/s of a large square matmul."""

    copy: float
    matmul: float


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Median wall seconds of a call, with the device's work done; a first call is not counted."""
    work()
    watch = Stopwatch()
    found = []
    for _ in range(repeats):
        watch.lap()
        work()
        found.append(watch.lap())
    return median(found)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """On random data: zeros draw less power, and so run at higher clocks than any training does."""
    side, size, repeats = (8192, 1 << 30, 20) if device.type == "cuda" else (1536, 1 << 26, 5)
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, device=device, dtype=dtype, generator=generator) for _ in range(2))
    out = torch.empty_like(left)
    matmul = 2 * side**3 / seconds_of(lambda: torch.matmul(left, right, out=out), repeats)
    source = torch.randn(size // 4, device=device, generator=generator)
    target = torch.empty_like(source)
    copy = 2 * size / seconds_of(lambda: target.copy_(source), repeats)
    return Ceilings(copy, matmul)
