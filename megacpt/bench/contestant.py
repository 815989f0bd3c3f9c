"""What every contestant of `bench.py train` tells: losses and seconds of its steps, and its memory."""

import resource
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from megacpt.files import read_json, write_json

FORMAT = "megacpt train contestant 1"


@dataclass
class Result:
    """Of each step its loss and its wall seconds; the largest memory in bytes: of the GPU, else resident.

    The GPU's is that of the steps after the first: while a model is read it may be there twice.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: int = 0
    format: str = FORMAT

    def step_took(self, seconds: float) -> None:
        """Note a step that has ended."""
        self.seconds.append(seconds)
        if len(self.seconds) == 1 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def write(self, path: Path) -> None:
        """Write it with the memory that this process has needed."""
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident
        write_json(path, asdict(self))


def read_result(path: Path) -> Result:
    """What `Result.write` wrote."""
    return Result(**read_json(path, FORMAT))


class Stopwatch:
    """Seconds since the last lap, with the GPU's work done."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def lap(self) -> float:
        """Wall seconds since the last lap."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        return seconds
