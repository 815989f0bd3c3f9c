"""How each kernel is launched on each device: tables in configs/, a pure lookup, and a tuner that writes a table.

A table is a list of rows, one for an operation, a width class and an item size. configs/default.json holds values
chosen by reasoning (elements a thread holds, bytes it loads at once); a device's own file holds what `tune` measured
there and comes first. `triton.autotune` is not used: it measures in the first steps of every process and may choose
differently on each rank and in each run, which makes a run's start slow and gives its sums another order.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton

FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Launch:
    """Elements that a program holds at once, its warps, the stages of its loads, and programs for each SM."""

    block: int
    warps: int
    stages: int = 1
    per_sm: int = 1


@dataclass(frozen=True)
class Entry:
    """A row of a table: `launch` for operation `op` on rows of up to `width` elements of `itemsize` bytes."""

    op: str
    width: int
    itemsize: int
    launch: Launch


def width_class(width: int) -> int:
    """Rows of one class are tuned together: the power of two that holds them."""
    return triton.next_power_of_2(width)


def choose(tuned: Sequence[Entry], default: Sequence[Entry], op: str, width: int, itemsize: int) -> Launch:
    """The launch of a tuned row of exactly this class, else of the default's narrowest row that is wide enough.

    Rows wider than every default take the widest one.

    Raises:
        ValueError: the defaults know no such operation.
    """
    for entry in tuned:
        if (entry.op, entry.width, entry.itemsize) == (op, width_class(width), itemsize):
            return entry.launch
    known = sorted((entry for entry in default if entry.op == op), key=lambda entry: entry.width)
    if not known:
        raise ValueError(f"no launch is known for {op}; add a row to configs/default.json")
    return next((entry.launch for entry in known if entry.width >= width), known[-1].launch)


def table_name(device_name: str) -> str:
    """The file of a device's table, from the name that CUDA gives the device."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json"


def table_path(device: torch.device) -> Path:
    """Where a device's own table is, or would be."""
    return FOLDER / table_name(torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter")


def read_table(path: Path) -> tuple[Entry, ...]:
    """The rows of a table; none if the file does not exist."""
    if not path.exists():
        return ()
    rows = json.loads(path.read_text(encoding="utf-8"))
    return tuple(Entry(row["op"], row["width"], row["itemsize"], Launch(**row["launch"])) for row in rows)


def write_table(path: Path, entries: Iterable[Entry]) -> None:
    """Replace the file by these rows, sorted; whole or not at all."""
    ordered = sorted(entries, key=lambda entry: (entry.op, entry.width, entry.itemsize))
    text = ",\n".join(json.dumps(asdict(entry)) for entry in ordered)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(f"[\n{text}\n]\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@functools.cache
def launch_for(op: str, width: int, itemsize: int, device: torch.device) -> Launch:
    """The launch of an operation on a device, from its own table or the defaults; the same in every process."""
    return choose(read_table(table_path(device)), read_table(FOLDER / "default.json"), op, width, itemsize)


def candidates(start: Launch) -> list[Launch]:
    """What is worth a measurement around a launch: half, twice and four times its block and warps, stages, programs.

    One stage, or one program for each SM, is what operations have that know of no others: these are not varied.
    """
    blocks = [start.block // 2, start.block, start.block * 2, start.block * 4]
    warps = sorted({min(max(start.warps * factor // 2, 1), 32) for factor in (1, 2, 4)})
    around = [replace(start, block=block, warps=warp) for block in blocks for warp in warps]
    return [
        replace(launch, stages=stages, per_sm=per_sm)
        for launch in around
        for stages in sorted({1, start.stages, 3} if start.stages > 1 else {1})
        for per_sm in sorted({1, start.per_sm, 2} if start.per_sm > 1 else {1})
    ]


def tune(
    run: Callable[[Launch], object], options: Sequence[Launch], milliseconds: Callable[[Callable[[], object]], float]
) -> Launch:
    """The fastest of `options`, the earliest of equals.

    Args:
        run: runs the operation once with a launch; a launch that the device cannot run raises and is passed over.
        options: launches to measure.
        milliseconds: device time of a call, for example `triton.testing.do_bench_cudagraph`.

    Raises:
        ValueError: no launch runs.
    """
    measured: list[tuple[float, Launch]] = []
    for launch in options:
        try:
            measured.append((milliseconds(functools.partial(run, launch)), launch))
        except triton.runtime.errors.OutOfResources:
            continue
    if not measured:
        raise ValueError("none of the launches fits the device; try smaller blocks")
    return min(measured, key=lambda pair: pair[0])[1]
