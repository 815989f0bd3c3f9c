"""Line charts as SVG text. Colours and type are classes of assets/page.css, for light, dark and print alike."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from megacpt.eval.stability import Floats
from megacpt.report.axes import Axis, LinearAxis, LogAxis, spread, token_axis, value_axis
from megacpt.report.chart import Chart, Level, LineChart, Note, Series
from megacpt.report.words import counted

WIDTH, HEIGHT = 560, 300
TOP, BOTTOM, LEFT = 14, 46, 58
CHARACTER = 6.3
"""Mean width of a character of 11 px type, in px; measured generously."""
LABEL_MOST = 24
"""Characters of a line's label; longer ones are cut in the middle."""


@dataclass(frozen=True)
class Frame:
    """Where a chart's area lies and how values come into it."""

    x: Axis
    y: LinearAxis
    right: float
    left: float = LEFT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM

    def px(self, tokens: Floats | float) -> Floats:
        """Horizontal places of tokens."""
        return self.left + self.x.place(np.asarray(tokens, np.float64)) * (self.right - self.left)

    def py(self, values: Floats | float) -> Floats:
        """Vertical places of values."""
        return self.bottom - self.y.place(np.asarray(values, np.float64)) * (self.bottom - self.top)


def draw_lines(chart: LineChart, *, log: bool) -> str:
    """A chart as an <svg> element that scales with its container.

    Args:
        log: a log token axis, on which the first steps are legible; else a linear one.
    """
    labels = [cut(series.label) for series in chart.series] + [cut(level.label) for level in chart.levels]
    right = WIDTH - 14 - CHARACTER * max(map(len, labels), default=0)
    columns = [c for s in chart.series for c in (s.y, s.low, s.high) if c is not None]
    levels = [np.array([level.y]) for level in chart.levels]
    y_axis = value_axis([*columns, *levels], chart.y_range, room=0.12 if chart.notes else 0.07)
    widest = max((len(text) for _, text in y_ticks(y_axis, chart)), default=0)
    frame = Frame(
        token_axis([s.x for s in chart.series], log=log), y_axis, right, left=max(LEFT, 26 + CHARACTER * widest)
    )
    parts = [
        *_axes(frame, chart),
        *(_level(frame, level) for level in chart.levels),
        *(_band(frame, series) for series in chart.series if series.low is not None and series.high is not None),
        *(_line(frame, series) for series in sorted(chart.series, key=lambda series: not series.faint)),
        *(_note(frame, note) for note in chart.notes),
        *_end_labels(frame, chart),
        f'<line class="guide" y1="{frame.top}" y2="{frame.bottom:.1f}" x1="-9" x2="-9"/>',
    ]
    at = tip_places(chart)
    places = " ".join(f"{place:.1f}" for place in frame.px(at)) if len(at) else ""
    return element(chart, parts, log=log, data=f' data-px="{places}"')


def cut(label: str) -> str:
    """A label of bearable length: beginning and end of a long one."""
    return label if len(label) <= LABEL_MOST else f"{label[: LABEL_MOST - 9]}\u2026{label[-8:]}"


def element(chart: Chart, parts: Iterable[str], *, log: bool, data: str = "") -> str:
    """The <svg> of a chart, its findings as what a screen reader says."""
    said = escape(". ".join([chart.title, *(finding.text for finding in chart.findings)]), quote=True)
    return (
        f'<svg class="chart {"log" if log else "linear"}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'tabindex="0" aria-label="{said}"{data}>' + "".join(parts) + "</svg>"
    )


def lettering(x: float, y: float, text: str, of: str = "", anchor: str = "start") -> str:
    """A <text> element of class `of`."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{of}" text-anchor="{anchor}">{escape(text)}</text>'


def _colour(number: int) -> str:
    return "grey" if number < 0 else f"c{number % 8}"


def _axes(frame: Frame, chart: LineChart) -> list[str]:
    parts = []
    for tick, text in y_ticks(frame.y, chart):
        y = float(frame.py(tick))
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(lettering(frame.left - 7, y + 4, text, "tick", "end"))
    return [*parts, *token_ticks(frame), y_label(frame, chart.y_label)]


def y_ticks(axis: LinearAxis, chart: Chart) -> list[tuple[float, str]]:
    """Ticks of the value axis and their text."""
    ticks = axis.ticks(6)
    return list(zip(ticks, without_idle_zeros([chart.write(tick) for tick in ticks]), strict=True))


def without_idle_zeros(texts: Sequence[str]) -> list[str]:
    """Decimals in common length, without final zeros that all of them have."""
    decimals = [text.partition(".")[2] for text in texts if "." in text]
    shortest = max((len(part.rstrip("0")) for part in decimals), default=0)
    if not all(part.isdigit() for part in decimals):
        return list(texts)
    kept = (text.partition(".") for text in texts)
    return [f"{whole}.{part[:shortest]}" if shortest and dot else whole for whole, dot, part in kept]


def y_label(frame: Frame, label: str) -> str:
    """The name of the value axis, turned."""
    middle = (frame.top + frame.bottom) / 2
    turned = f'transform="translate(12 {middle:.0f}) rotate(-90)"'
    return f'<text class="label" text-anchor="middle" {turned}>{escape(label)}</text>'


def token_ticks(frame: Frame) -> list[str]:
    """The token axis: its line, its ticks, its name and, on a log axis, the break after step 0."""
    y = frame.bottom
    parts = [f'<line class="axis" x1="{frame.left}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>']
    for tick in frame.x.ticks(8):
        x = float(frame.px(tick))
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y + 4:.1f}"/>')
        parts.append(lettering(x, y + 16, counted(tick) if tick else "0", "tick", "middle"))
    scale = "log scale from the first step on" if isinstance(frame.x, LogAxis) else "linear scale"
    middle = (frame.left + frame.right) / 2
    parts.append(lettering(middle, y + 36, f"tokens trained on ({scale})", "label", "middle"))
    if isinstance(frame.x, LogAxis):
        gap = (float(frame.px(0.0)) + float(frame.px(frame.x.first))) / 2
        parts.append(f'<path class="break" d="M{gap - 5:.1f} {y + 5:.1f}l4 -10M{gap + 1:.1f} {y + 5:.1f}l4 -10"/>')
    return parts


def _pieces(series: Series, *columns: Floats) -> list[list[Floats]]:
    """The columns cut where any is not finite; pieces of at least one point."""
    known = np.all([np.isfinite(column) for column in columns], axis=0)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], known.astype(np.int8), [0]])))
    spans = zip(edges[::2], edges[1::2], strict=True)
    return [[column[start:end] for column in (series.x, *columns)] for start, end in spans]


def _path(x: Floats, y: Floats) -> str:
    return "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))


def _line(frame: Frame, series: Series) -> str:
    of = f"{_colour(series.colour)}{' faint' if series.faint else ''}{' dashed' if series.dashed else ''}"
    parts = []
    for x, y in [] if series.filled else _pieces(series, series.y):
        px, py = frame.px(x), frame.py(y)
        parts.append(f'<path class="line {of}" d="M{_path(px, py)}"/>')
        if series.points or len(x) == 1:
            parts += [
                f'<circle class="point {of}" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>' for a, b in zip(px, py, strict=True)
            ]
    return "".join(parts)


def _band(frame: Frame, series: Series) -> str:
    assert series.low is not None
    assert series.high is not None
    of = f"{'area' if series.filled else 'band'} {_colour(series.colour)}"
    parts = []
    for x, low, high in _pieces(series, series.low, series.high):
        px = frame.px(x)
        parts.append(f'<path class="{of}" d="M{_path(px, frame.py(low))}L{_path(px[::-1], frame.py(high)[::-1])}Z"/>')
    return "".join(parts)


def _level(frame: Frame, level: Level) -> str:
    y, of = float(frame.py(level.y)), _colour(level.colour)
    return f'<line class="level {of}" x1="{frame.left}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _note(frame: Frame, note: Note) -> str:
    x, y, base = float(frame.px(note.x)), float(frame.py(note.y)), float(frame.py(note.base))
    of = _colour(note.colour)
    width = CHARACTER * len(note.text)
    anchor, shift = ("end", -8) if x + 8 + width > frame.right else ("start", 8)
    if note.kind == "dip":
        # Beside the far end of the bracket, where the curve turns and leaves room outside.
        below = y > base
        ty = min(y + 16, frame.bottom - 5) if below else max(y - 9, frame.top + 9)
        return (
            f'<path class="bracket {of}" d="M{x:.1f} {base:.1f}V{y:.1f}M{x - 4:.1f} {base:.1f}h8"/>'
            f'<circle class="ring {of}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
            + lettering(x + shift, ty, note.text, f"note {of}", anchor)
        )
    # On the side away from the dip, ending here: before it is back, the curve is on the other side.
    ty = max(y - 10, frame.top + 9) if note.above else min(y + 18, frame.bottom - 4)
    begins_left = x - width > frame.left
    return f'<circle class="ring open {of}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>' + lettering(
        x + 6 if begins_left else x - 6, ty, note.text, f"note {of}", "end" if begins_left else "start"
    )


def _end_labels(frame: Frame, chart: LineChart) -> list[str]:
    found: list[tuple[float, str, str]] = []
    for series in chart.series:
        known = np.flatnonzero(np.isfinite(series.y))
        if series.label and len(known):
            last = known[-1]
            y = series.y[last]
            if series.filled and series.low is not None and series.high is not None:
                y = (series.low[last] + series.high[last]) / 2
            found.append((float(frame.py(y)), series.label, _colour(series.colour)))
    found += [(float(frame.py(level.y)), level.label, "grey") for level in chart.levels if level.label]
    places = spread([y for y, _, _ in found], 13.0, frame.top + 4, frame.bottom)
    return [
        lettering(frame.right + 7, place + 4, cut(label), f"end {of}")
        for (_, label, of), place in zip(found, places, strict=True)
    ]


def tip_places(chart: LineChart) -> Floats:
    """The tokens at which a chart has something to tell."""
    columns = [series.x[np.isfinite(series.y)] for series in chart.series]
    return np.unique(np.concatenate([*columns, np.empty(0)]))


def tips(chart: LineChart) -> str:
    """JSON for the pointer: [[where, [[colour class, name, value], ...]], ...], in the order of tip_places."""
    rows: list[tuple[str, list[tuple[str, str, str]]]] = []
    lookup = [dict(zip(s.x.tolist(), range(len(s.x)), strict=True)) for s in chart.series]
    for place in tip_places(chart).tolist():
        told = []
        for series, index in zip(chart.series, lookup, strict=True):
            at = index.get(place)
            if at is not None and np.isfinite(series.y[at]):
                told.append((_colour(series.colour), series.label or chart.title, _told(chart, series, at)))
        rows.append((f"{counted(place)} tokens", told))
    return json.dumps(rows, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _told(chart: LineChart, series: Series, at: int) -> str:
    value = chart.write(float(series.y[at]))
    if series.filled and series.low is not None and series.high is not None:
        return chart.write(float(series.high[at] - series.low[at]))
    if series.low is None or series.high is None or not np.isfinite(series.low[at]):
        return value
    return f"{value} [{chart.write(float(series.low[at]))}, {chart.write(float(series.high[at]))}]"
