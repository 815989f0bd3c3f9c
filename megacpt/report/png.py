"""The report's charts as PNG files, drawn by matplotlib from what the page draws as SVG."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megacpt.errors import UserError
from megacpt.files import atomic_write, make_folder
from megacpt.report.arms import Arm
from megacpt.report.axes import LogAxis, token_axis, value_axis
from megacpt.report.chart import COLOURS, Chart, HeatMap, LineChart, Note, Series
from megacpt.report.gap_charts import difference_charts, gap_charts
from megacpt.report.heat import cell_edges, value_range
from megacpt.report.palette import DIVERGING, SEQUENTIAL
from megacpt.report.svg import y_ticks
from megacpt.report.training_charts import training_charts, weight_charts
from megacpt.report.words import counted

INCHES = (7.2, 4.2)
DOTS = 160
GREY = "#5c6570"


def write_pngs(folder: Path, arms: Sequence[Arm]) -> list[Path]:
    """Write every chart of the report, each file at once and whole.

    Raises:
        UserError: matplotlib is not installed, or the folder cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--png needs matplotlib, which is not installed; install megacpt[plot]") from error
    runs = [(run, arm.colour) for arm in arms for run in arm.runs]
    pairs = [(arms[0], other) for other in arms[1:] if not all(arm.single for arm in arms)]
    charts: list[Chart] = [
        *gap_charts(arms),
        *(chart for a, b in pairs for chart in difference_charts(a, b)),
        *training_charts(runs),
        *weight_charts(runs),
    ]
    make_folder(folder)
    written: list[Path] = []
    for chart in charts:
        figure = Figure(figsize=INCHES, dpi=DOTS, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _draw(figure, axes, chart)
        path = folder / f"{slug(chart.title, [p.stem for p in written])}.png"
        with atomic_write(path) as handle:
            figure.savefig(handle, format="png")
        written.append(path)
    return written


def slug(title: str, taken: Sequence[str]) -> str:
    """A file name of a title, unlike those taken."""
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "chart"
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name}-{number}", number + 1
    return unique


def _draw(figure: Any, axes: Any, chart: Chart) -> None:
    told = [f"{finding.name}: {finding.text}" if finding.name else finding.text for finding in chart.findings[:4]]
    said = "\n".join(line for sentence in told for line in textwrap.wrap(sentence, 100))
    axes.set_title(chart.title, loc="left", fontsize=11, fontweight="bold", pad=10 + 12 * (said.count("\n") + 1))
    axes.text(0, 1.02, said, transform=axes.transAxes, fontsize=8, va="bottom", wrap=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=GREY, labelsize=8)
    axes.set_ylabel(chart.y_label, fontsize=8, color=GREY)
    if isinstance(chart, HeatMap):
        _heat_map(figure, axes, chart)
    else:
        _lines(axes, chart)


def _token_axis(axes: Any, axis: Any) -> None:
    ticks = axis.ticks(8)
    axes.set_xticks(axis.place(np.array(ticks)), [counted(tick) if tick else "0" for tick in ticks])
    scale = "log scale from the first step on" if isinstance(axis, LogAxis) else "linear scale"
    axes.set_xlabel(f"tokens trained on ({scale})", fontsize=8, color=GREY)


def _colour(number: int) -> str:
    return GREY if number < 0 else COLOURS[number % len(COLOURS)]


def _lines(axes: Any, chart: LineChart) -> None:
    axis = token_axis([series.x for series in chart.series], log=True)
    columns = [c for s in chart.series for c in (s.y, s.low, s.high) if c is not None]
    y_axis = value_axis([*columns, *(np.array([level.y]) for level in chart.levels)], chart.y_range, room=0.12)
    axes.set_xlim(0, 1)
    axes.set_ylim(y_axis.low, y_axis.high)
    ticks, texts = zip(*y_ticks(y_axis, chart), strict=True)
    axes.set_yticks(ticks, texts)
    axes.grid(axis="y", color="#eaedf0")
    axes.set_axisbelow(True)
    for level in chart.levels:
        axes.axhline(level.y, color=_colour(level.colour), linewidth=1, linestyle=":")
        axes.annotate(
            level.label, (1, level.y), xytext=(6, 0), textcoords="offset points", fontsize=8, va="center", color=GREY
        )
    for series in chart.series:
        _series(axes, axis.place(series.x), series)
    for note in chart.notes:
        _note(axes, float(axis.place(np.array(note.x))), note)
    named = [series for series in chart.series if series.label]
    if len(named) > 1:
        axes.legend(fontsize=8, frameon=False, loc="best")
    _token_axis(axes, axis)


def _series(axes: Any, x: Any, series: Series) -> None:
    colour = _colour(series.colour)
    if series.low is not None and series.high is not None:
        label = series.label if series.filled else None
        alpha = 0.8 if series.filled else 0.16
        axes.fill_between(x, series.low, series.high, color=colour, alpha=alpha, linewidth=0, label=label)
    if series.filled:
        return
    axes.plot(
        x, series.y, color=colour, label=series.label or None, linewidth=0.8 if series.faint else 1.8,
        alpha=0.4 if series.faint else 1.0, linestyle="--" if series.dashed else "-",
        marker="o" if series.points else None, markersize=3.5,
    )  # fmt: skip


def _note(axes: Any, x: float, note: Note) -> None:
    colour = _colour(note.colour)
    if note.kind == "dip":
        axes.plot([x, x], [note.base, note.y], color=colour, linewidth=1.2)
    face = "none" if note.kind == "dip" else "white"
    axes.plot([x], [note.y], "o", markersize=8, markerfacecolor=face, markeredgecolor=colour, zorder=4)
    outside = -1 if (note.y < note.base if note.kind == "dip" else not note.above) else 1
    axes.annotate(
        note.text, (x, note.y), xytext=(0, 11 * outside), textcoords="offset points", fontsize=8, fontweight="bold",
        color=colour, ha="right" if x > 0.6 else "left", va="bottom" if outside > 0 else "top",
    )  # fmt: skip


def _heat_map(figure: Any, axes: Any, chart: HeatMap) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    axis = token_axis([chart.x], log=True)
    edges = np.clip(cell_edges(axis.place(chart.x)), 0, 1)
    palette = LinearSegmentedColormap.from_list("report", DIVERGING if chart.diverging else SEQUENTIAL)
    low, high = value_range(chart)
    rows = np.arange(len(chart.rows) + 1)
    cells = axes.pcolormesh(edges, rows, np.ma.masked_invalid(chart.values.T), cmap=palette, vmin=low, vmax=high)
    every = max(1, -(-len(chart.rows) // 20))
    axes.set_yticks(rows[:-1:every] + 0.5, chart.rows[::every])
    axes.set_xlim(0, 1)
    bar = figure.colorbar(cells, ax=axes)
    bar.set_label(chart.value_label, fontsize=8, color=GREY)
    bar.ax.tick_params(labelsize=8, colors=GREY)
    bar.outline.set_visible(False)
    _token_axis(axes, axis)
