"""Heat maps as SVG text."""

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from itertools import pairwise

import numpy as np

from megacpt.eval.stability import Floats
from megacpt.report.axes import LinearAxis, token_axis
from megacpt.report.chart import HeatMap
from megacpt.report.palette import DIVERGING, SEQUENTIAL, shade
from megacpt.report.svg import WIDTH, Frame, element, lettering, token_ticks, y_label, y_ticks
from megacpt.report.words import counted


def cell_edges(places: Floats) -> Floats:
    """Edges of n cells around n increasing places: half-way between neighbours, the outer cells symmetric."""
    if len(places) == 1:
        return np.array([places[0] - 6, places[0] + 6])
    middles = (places[1:] + places[:-1]) / 2
    return np.concatenate([[2 * places[0] - middles[0]], middles, [2 * places[-1] - middles[-1]]])


def draw_heat_map(chart: HeatMap, *, log: bool) -> str:
    """A heat map as an <svg> element that scales with its container; `log` as for lines."""
    right = WIDTH - 76.0
    frame = Frame(token_axis([chart.x], log=log), LinearAxis(0, len(chart.rows)), right)
    edges = np.clip(cell_edges(frame.px(chart.x)), frame.left, frame.right)
    low, high = value_range(chart)
    palette = DIVERGING if chart.diverging else SEQUENTIAL
    parts = []
    for column, (start, end) in enumerate(pairwise(edges)):
        for row, name in enumerate(chart.rows):
            value = chart.values[column, row]
            if not np.isfinite(value):
                continue
            top, bottom = float(frame.py(row + 1)), float(frame.py(row))
            told = f"{name}, {counted(chart.x[column])} tokens: {chart.write(float(value))}"
            place = f'x="{start:.1f}" y="{top:.1f}" width="{end - start + 0.3:.1f}" height="{bottom - top + 0.3:.1f}"'
            fill = shade(palette, (value - low) / (high - low))
            parts.append(f'<rect class="cell" {place} fill="{fill}"><title>{escape(told)}</title></rect>')
    every = max(1, -(-len(chart.rows) * 13 // int(frame.bottom - frame.top)))
    for row in range(0, len(chart.rows), every):
        parts.append(lettering(frame.left - 7, float(frame.py(row + 0.5)) + 4, chart.rows[row], "tick", "end"))
    parts += [*token_ticks(frame), y_label(frame, chart.y_label), *_colour_bar(chart, frame, palette, (low, high))]
    return element(chart, parts, log=log)


def on_one_scale(charts: Sequence[HeatMap]) -> list[HeatMap]:
    """Maps of one quantity, so that a colour means the same in all of them."""
    ranges = [value_range(chart) for chart in charts if np.isfinite(chart.values).any()]
    if not ranges:
        return list(charts)
    extent = min(low for low, _ in ranges), max(high for _, high in ranges)
    return [replace(chart, extent=extent) for chart in charts]


def value_range(chart: HeatMap) -> tuple[float, float]:
    """The values at the ends of the palette."""
    if chart.extent is not None:
        return chart.extent
    known = chart.values[np.isfinite(chart.values)]
    if not len(known):
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    if chart.diverging:
        high = max(abs(low), abs(high)) or 1.0
        return -high, high
    return (low, high) if high > low else (low, low + 1.0)


def _colour_bar(chart: HeatMap, frame: Frame, palette: Sequence[str], ends: tuple[float, float]) -> list[str]:
    x, steps, height = frame.right + 14, 24, (frame.bottom - frame.top) / 24
    parts = [
        f'<rect x="{x:.1f}" y="{frame.bottom - (n + 1) * height:.1f}" width="11" height="{height + 0.5:.1f}" '
        f'fill="{shade(palette, (n + 0.5) / steps)}"/>'
        for n in range(steps)
    ]
    axis = LinearAxis(*ends)
    for tick, text in y_ticks(axis, chart):
        y = frame.bottom - float(axis.place(np.asarray(tick))) * (frame.bottom - frame.top)
        parts.append(lettering(x + 15, y + 4, text, "tick"))
    parts.append(lettering(WIDTH - 4, frame.bottom + 36, chart.value_label, "label", "end"))
    return parts
