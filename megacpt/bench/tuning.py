"""Launches measured on this GPU at the widths of real models, for kernels/configs/DEVICE.json."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import triton

from megacpt.errors import UserError
from megacpt_kernels.launch import (
    Entry,
    Launch,
    candidates,
    launch_for,
    read_table,
    table_path,
    tune,
    width_class,
    write_table,
)
from megacpt_kernels.rmsnorm import rms_norm_backward, rms_norm_forward
from megacpt_kernels.rope import rotate
from megacpt_kernels.swiglu import swiglu_backward, swiglu_forward
from megacpt_kernels.vocabulary import Shard, logit_gradient_, statistics

ROWS = 8192
BYTES = 128 << 20
"""An input has more rows, if so many are smaller than this: in a model the last operation's are not in the cache."""
# Widths: one of each class.
NORM_WIDTHS = (576, 2048, 4096, 8192)
MLP_WIDTHS = (1536, 8192, 14_336)
HEADS = (64, 128)
VOCABULARIES = (32_000, 49_152, 128_256)
DTYPE = torch.bfloat16

Work = tuple[str, int, Callable[[Launch], object]]
Clock = Callable[[Callable[[], object]], float]


def rows_of(elements: int) -> int:
    """Rows of an input with `elements` in each."""
    return max(ROWS, BYTES // (elements * DTYPE.itemsize))


def works(device: torch.device) -> Iterator[Work]:
    """(operation, width, the operation with a launch), one after another, so that memory holds one."""
    random = partial(torch.randn, device=device, dtype=DTYPE)
    for width in NORM_WIDTHS:
        rows = rows_of(width)
        x, weight, dy = random(rows, width), random(width), random(rows, width)
        scale = torch.rand(rows, device=device)
        yield "rms_norm_forward", width, partial(rms_norm_forward, x, None, weight, 1e-5)
        yield "rms_norm_backward", width, partial(rms_norm_backward, dy, None, x, weight, scale)
    for width in MLP_WIDTHS:
        rows = rows_of(2 * width)
        x, dy = random(rows, 2 * width), random(rows, width)
        yield "swiglu_forward", width, partial(swiglu_forward, x)
        yield "swiglu_backward", width, partial(swiglu_backward, dy, x)
    for width in HEADS:
        rows = rows_of(32 * width)
        x, phases = random(rows, 1, 32, width), torch.rand(rows, 1, width, device=device)
        y = torch.empty_like(x)
        form = partial(rotate, x, y, phases, None, interleaved=False, mscale=1.0, backward=False)
        yield "rope", width, lambda launch, form=form: form(launch=launch)  # type: ignore[misc]
    for width in VOCABULARIES:
        logits, shard = random(ROWS, width), Shard.of(width, None, None)
        targets = torch.randint(width, (ROWS,), device=device)
        normaliser = torch.full((ROWS,), 12.0, device=device)
        upstream = torch.ones(ROWS, device=device)
        yield "cross_entropy_statistics", width, partial(statistics, logits, targets, shard)
        yield "cross_entropy_gradient", width, partial(logit_gradient_, logits, targets, normaliser, upstream, shard)


def options(operation: str, start: Launch, width: int) -> list[Launch]:
    """Launches to measure, each once: RMSNorm holds whole rows, however small the block."""
    least = width_class(width) if operation.startswith("rms_norm") else 1
    return list(dict.fromkeys(replace(launch, block=max(launch.block, least)) for launch in candidates(start)))


def tune_all(device: torch.device, deadline: float = math.inf, milliseconds: Clock | None = None) -> Path:
    """Measure what the device's table has not yet, and add each to it; returns its path.

    Args:
        deadline: of time.monotonic; after it nothing more is begun, and the next call goes on.
        milliseconds: as for `tune`; triton's on a GPU.

    Raises:
        UserError: the table cannot be written.
    """
    path = table_path(device)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make its folder writable") from error
    for operation, width, work in works(device):
        key = operation, width_class(width), DTYPE.itemsize
        found = read_table(path)
        if key in {(entry.op, entry.width, entry.itemsize) for entry in found}:
            continue
        if time.monotonic() >= deadline:
            break
        start = launch_for(operation, width, DTYPE.itemsize, device)
        best = tune(work, options(operation, start, width), milliseconds or triton.testing.do_bench_cudagraph)
        write_table(path, [*found, Entry(*key, best)])
    launch_for.cache_clear()
    return path
