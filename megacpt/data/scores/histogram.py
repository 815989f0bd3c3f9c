"""A picture of how scores are distributed, with the thresholds that were chosen."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megacpt.errors import UserError
from megacpt.files import atomic_write

BINS = 80


def plot_scores(
    path: Path, values: np.ndarray, title: str, label: str, thresholds: Sequence[tuple[str, float]] = ()
) -> None:
    """Write a PNG: a histogram of the finite scores, on a log axis where all are positive; marked quartiles.

    Args:
        values: float32 [documents]; infinite ones are left out and counted in the title.
        label: what a score is, for the axis.
        thresholds: (words, score) of lines to draw.

    Raises:
        UserError: matplotlib is not installed, or no score is finite.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot: matplotlib is not installed; pip install 'megacpt[plot]'") from error
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise UserError("--plot: no document has a score")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    positive = bool(finite.min() > 0)
    low, high = (np.quantile(finite, share) for share in (0.0005, 0.9995))
    if not low < high:
        low, high = finite.min() * 0.9 if positive else finite.min() - 1, finite.max() * 1.1 + 1e-9
    edges = np.geomspace(low, high, BINS + 1) if positive else np.linspace(low, high, BINS + 1)
    axes.hist(np.clip(finite, low, high), bins=edges.tolist(), color="#7aa6c2", edgecolor="white", linewidth=0.3)
    if positive:
        axes.set_xscale("log")
    for share, style in ((0.25, ":"), (0.5, "-"), (0.75, ":")):
        quantile = float(np.quantile(finite, share))
        axes.axvline(quantile, color="#444444", linestyle=style, linewidth=1, label=f"{share:.0%}: {quantile:.4g}")
    for color, (words, score) in zip(("#c1272d", "#e58a00", "#2e7d32", "#6a1b9a"), thresholds, strict=False):
        axes.axvline(score, color=color, linewidth=2, label=f"{words}: {score:.4g}")
    axes.set_xlabel(label)
    axes.set_ylabel("documents")
    axes.spines[["top", "right"]].set_visible(False)
    left_out = len(values) - len(finite)
    axes.set_title(title + (f" ({left_out:,} without a score left out)" if left_out else ""), fontsize=11)
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)
    with atomic_write(path) as handle:
        figure.savefig(handle, format="png")
