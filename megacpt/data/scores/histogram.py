"""A picture of how scores are distributed, with the thresholds that were chosen."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megacpt.errors import UserError
from megacpt.files import atomic_write

BINS = 80


def check_plotting() -> None:
    """Refuse a plot that cannot be drawn, before the work that it would show.

    Raises:
        UserError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot: matplotlib is not installed; pip install 'megacpt[plot]'")


def plot_scores(
    path: Path, values: np.ndarray, title: str, label: str, thresholds: Sequence[tuple[str, float]] = ()
) -> None:
    """Write a PNG: a histogram of the finite scores, on a log axis where all are positive; marked quartiles.

    Args:
        values: float32 [documents]; infinite ones are left out and counted in the title.
        label: what a score is, for the axis.
        thresholds: (words, score) of lines to draw.

    Raises:
        UserError: matplotlib is not installed, or the disk is full.
    """
    check_plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    finite = values[np.isfinite(values)]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if len(finite):
        _draw(axes, finite)
    for color, (words, score) in zip(("#c1272d", "#e58a00", "#2e7d32", "#6a1b9a"), thresholds, strict=False):
        axes.axvline(score, color=color, linewidth=2, label=f"{words}: {score:.4g}")
    axes.set_xlabel(label)
    axes.set_ylabel("documents")
    axes.spines[["top", "right"]].set_visible(False)
    left_out = len(values) - len(finite)
    axes.set_title(title + (f" ({left_out:,} without a score left out)" if left_out else ""), fontsize=11)
    if len(finite):
        axes.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)
    with atomic_write(path) as handle:
        figure.savefig(handle, format="png")


def _draw(axes: Any, finite: np.ndarray) -> None:
    """The bars, and a line at each quartile."""
    positive = bool(finite.min() > 0)
    low, high = (float(np.quantile(finite, share)) for share in (0.0005, 0.9995))
    if not low < high:
        low, high = (low * 0.9, high * 1.1) if positive else (low - 1, high + 1)
    edges = np.geomspace(low, high, BINS + 1) if positive else np.linspace(low, high, BINS + 1)
    axes.hist(np.clip(finite, low, high), bins=edges.tolist(), color="#7aa6c2", edgecolor="white", linewidth=0.3)
    if positive:
        axes.set_xscale("log")
    for share, style in ((0.25, ":"), (0.5, "-"), (0.75, ":")):
        quantile = float(np.quantile(finite, share))
        axes.axvline(quantile, color="#444444", linestyle=style, linewidth=1, label=f"{share:.0%}: {quantile:.4g}")
