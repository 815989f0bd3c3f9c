"""Launches measured on this GPU at the widths of real models, for kernels/configs/DEVICE.json."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import triton

from megacpt_kernels.launch import (
    FOLDER,
    Entry,
    Launch,
    candidates,
    launch_for,
    table_name,
    tune,
    width_class,
    write_table,
)
from megacpt_kernels.rmsnorm import rms_norm_backward, rms_norm_forward
from megacpt_kernels.rope import rotate
from megacpt_kernels.swiglu import swiglu_backward, swiglu_forward
from megacpt_kernels.vocabulary import Shard, logit_gradient_, statistics

ROWS = 8192
NORM_WIDTHS = (576, 2048, 3072, 4096, 8192)
MLP_WIDTHS = (1536, 5632, 8192, 14_336)
HEADS = (64, 128)
VOCABULARIES = (32_000, 49_152, 128_256)
DTYPE = torch.bfloat16

Work = tuple[str, int, Callable[[Launch], object]]


def works(device: torch.device) -> Iterator[Work]:
    """(operation, width, the operation with a launch), one after another, so that memory holds one."""
    random = partial(torch.randn, device=device, dtype=DTYPE)
    for width in NORM_WIDTHS:
        x, weight, dy = random(ROWS, width), random(width), random(ROWS, width)
        scale = torch.rand(ROWS, device=device)
        yield "rms_norm_forward", width, partial(rms_norm_forward, x, None, weight, 1e-5)
        yield "rms_norm_backward", width, partial(rms_norm_backward, dy, None, x, weight, scale)
    for width in MLP_WIDTHS:
        x, dy = random(ROWS, 2 * width), random(ROWS, width)
        yield "swiglu_forward", width, partial(swiglu_forward, x)
        yield "swiglu_backward", width, partial(swiglu_backward, dy, x)
    for width in HEADS:
        x, phases = random(ROWS, 1, 32, width), torch.rand(ROWS, 1, width, device=device)
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


def tune_all(device: torch.device) -> Path:
    """Measure, and write the device's table; returns its path."""
    found = []
    for operation, width, work in works(device):
        start = launch_for(operation, width, DTYPE.itemsize, device)
        best = tune(work, candidates(start), triton.testing.do_bench_cudagraph)
        found.append(Entry(operation, width_class(width), DTYPE.itemsize, best))
    path = FOLDER / table_name(torch.cuda.get_device_name(device))
    write_table(path, found)
    launch_for.cache_clear()
    return path
