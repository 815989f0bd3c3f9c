"""What a chart is, before anybody draws it: numbers, names and words. Drawn as SVG in the page and by matplotlib."""

from collections.abc import Callable
from dataclasses import dataclass

from megacpt.eval.stability import Floats

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b08600", "#56b4e9", "#7a5195", "#4d4d4d")
"""Okabe and Ito's colours, apart for colour-blind readers; its yellow darkened, then two more."""
POINTS_MOST = 80
"""Evaluations of a curve that are marked each; of more, marks would be all that is seen."""
GREY = -1
"""The colour number of what belongs to no run."""


@dataclass(frozen=True)
class Series:
    """A line over tokens.

    Attributes:
        x, y: float64 [n]; a NaN in y is a hole.
        low, high: float64 [n] of a band, or None.
        colour: number of its colour; equal numbers are of one run (or one source).
        label: written at its end; empty for none.
        points: mark each point (evaluations are points, training is a line).
        faint: drawn thin, behind others.
        dashed: a second way to tell it apart.
        filled: the band is an area of its own, and its borders need no line.
    """

    x: Floats
    y: Floats
    colour: int
    label: str
    low: Floats | None = None
    high: Floats | None = None
    points: bool = False
    faint: bool = False
    dashed: bool = False
    filled: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal reference line."""

    y: float
    label: str
    colour: int = GREY


@dataclass(frozen=True)
class Note:
    """A place that is named: "dip" is a drop from `base` to y, "recovery" a point where a curve is back.

    Attributes:
        above: whether above is the side away from the dip.
    """

    kind: str
    x: float
    y: float
    base: float
    text: str
    colour: int
    above: bool = True


@dataclass(frozen=True)
class Finding:
    """A sentence computed from the data, and the colour of what it speaks of."""

    text: str
    colour: int = GREY
    name: str = ""


@dataclass(frozen=True)
class LineChart:
    """Lines over tokens with one value axis. `write` turns a value into text."""

    title: str
    findings: tuple[Finding, ...]
    y_label: str
    series: tuple[Series, ...]
    write: Callable[[float], str]
    levels: tuple[Level, ...] = ()
    notes: tuple[Note, ...] = ()
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class HeatMap:
    """Rows of cells over tokens.

    Attributes:
        x: float64 [n], tokens of the columns.
        rows: names [m], the first drawn lowest.
        values: float64 [n, m].
        diverging: the palette's middle is zero.
        extent: the values at the ends of the palette, where maps are to be compared; else this map's own.
    """

    title: str
    findings: tuple[Finding, ...]
    y_label: str
    value_label: str
    x: Floats
    rows: tuple[str, ...]
    values: Floats
    write: Callable[[float], str]
    diverging: bool = False
    extent: tuple[float, float] | None = None


Chart = LineChart | HeatMap
