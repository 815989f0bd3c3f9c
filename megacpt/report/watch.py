"""Runs in a terminal while they train: plain text, redrawn."""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TextIO

import numpy as np

from megacpt.errors import UserError
from megacpt.eval.stability import Floats
from megacpt.report.rows import NotYet
from megacpt.report.run import RunData
from megacpt.report.run_tables import status
from megacpt.report.words import counted, signed, tokens_text, value_text

BLOCKS = "▁▂▃▄▅▆▇█"
CLEAR = "\033[H\033[2J"
SPARK = 32
"""Characters of a curve, fewer in a narrow terminal."""


def sparkline(values: Floats, width: int) -> str:
    """Values as blocks of eight heights, of equal stretches where there are more than `width`; a hole is a space."""
    if len(values) > width:
        starts = np.linspace(0, len(values), width, endpoint=False).astype(np.int64)
        known = np.isfinite(values)
        count = np.add.reduceat(known.astype(np.float64), starts)
        total = np.add.reduceat(np.where(known, values, 0.0), starts)
        values = np.divide(total, count, out=np.full(width, np.nan), where=count > 0)
    known = values[np.isfinite(values)]
    if not len(known):
        return " " * len(values)
    low, span = float(known.min()), float(known.max() - known.min())
    return "".join(
        " " if not np.isfinite(value) else BLOCKS[round((value - low) / span * 7) if span else 0] for value in values
    )


def screen(runs: Sequence[RunData], width: int) -> str:
    """What the terminal shows, lines of at most `width` characters."""
    lines: list[str] = []
    for run in runs:
        state, progress = status(run)
        lines += [f"{run.name}: {', '.join(filter(None, (state, progress, tokens_text(run.tokens))))}"]
        lines += _training_lines(run, width)
        if run.metrics:
            lines += ["  abilities: course, now (change since step 0)", *_metric_lines(run, width)]
        lines += [f"  ! {notice}" for notice in run.notices[-3:]]
        lines.append("")
    return "\n".join(line[:width] for line in lines)


def _training_lines(run: RunData, width: int) -> list[str]:
    training = run.training
    if not len(training.iteration):
        return ["  no step logged yet"]
    spark = max(8, min(SPARK, width - 48))
    names = {f"loss {name}": source.loss for name, source in training.sources.items()}
    pad = max(map(len, names))
    lines = [
        f"  {name:<{pad}} {sparkline(loss, spark):<{spark}} {value_text(_last(loss))}" for name, loss in names.items()
    ]
    speed = float(np.nanmedian(training.tokens_per_second[-20:]))
    epochs = ", ".join(f"{name} {source.epochs[-1]:.2f}" for name, source in training.sources.items())
    lines.append(
        f"  lr {training.learning_rate[-1]:.3g}, gradient norm {value_text(float(training.grad_norm[-1]))}, "
        f"{counted(speed)} tokens/s, epochs: {epochs}"
    )
    return lines


def _last(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else float("nan")


def _metric_lines(run: RunData, width: int) -> list[str]:
    pad = max((len(metric.title) for metric in run.metrics), default=0)
    spark = max(8, min(SPARK, width - pad - 42))
    lines = []
    for metric in run.metrics:
        numbers = metric.gap
        if numbers is None:
            continue
        told = value_text(numbers.final.value)
        if numbers.start is not None and numbers.delta is not None and len(metric.curve) > 1:
            worst = f"; worst {value_text(numbers.worst.value)} at {counted(numbers.worst.tokens)}"
            told += f" ({signed(numbers.delta)}{worst if numbers.dipped else ''})"
        lines.append(f"  {metric.title:<{pad}} {sparkline(metric.curve.value, spark):<{spark}} {told}")
    return lines


def watch(
    read: Callable[[], Sequence[RunData]],
    every: float,
    out: TextIO = sys.stdout,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Show what `read` gives, again and again, until every run has ended or Ctrl-C.

    A terminal is redrawn; into a file or pipe each look is appended. What cannot be read for the moment is said and
    tried again.

    Raises:
        UserError: a run is missing or damaged at the first look.
    """
    terminal, first = out.isatty(), True
    try:
        while True:
            runs: Sequence[RunData] = ()
            try:
                runs = read()
                text = screen(runs, shutil.get_terminal_size().columns)
            except UserError as error:
                if first and not isinstance(error, NotYet):
                    raise
                text = f"{error}\n"
            print(f"{CLEAR if terminal else ''}{datetime.now():%H:%M:%S}\n{text}", file=out, flush=True)
            if runs and all(run.ended for run in runs):
                return
            first = False
            wait(every)
    except KeyboardInterrupt:
        return
