"""Axes: from values to places, and the values worth a tick."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megacpt.eval.stability import Floats

ZERO_SHARE = 0.08
"""Of a log axis: room at its left for step 0, which has no logarithm."""


@dataclass(frozen=True)
class LinearAxis:
    """Values low..high at 0..1 of the axis."""

    low: float
    high: float

    def place(self, values: Floats) -> Floats:
        """Where values lie: 0 is the axis's beginning, 1 its end."""
        return (values - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[float]:
        """Round values inside the axis, at most `most`."""
        step = nice_step((self.high - self.low) / max(1, most - 1))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(number * step, 12) for number in range(first, last + 1)]


@dataclass(frozen=True)
class LogAxis:
    """Tokens on a log axis from `first` > 0 to `high`, zero at the very left, beyond a break."""

    first: float
    high: float
    low: float = 0.0

    def place(self, values: Floats) -> Floats:
        """Where values lie; between zero and `first` in proportion."""
        span = math.log(self.high / self.first)
        logs = np.log(np.maximum(values, self.first) / self.first) / span
        return np.where(values < self.first, ZERO_SHARE * values / self.first, ZERO_SHARE + (1 - ZERO_SHARE) * logs)

    def ticks(self, most: int) -> list[float]:
        """Zero and the 1, 2, 5 (or only the 1) of decades."""
        decades = range(math.floor(math.log10(self.first)), math.floor(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [d * 10.0**n for n in decades for d in digits if self.first <= d * 10.0**n <= self.high]
            if len(found) < most:
                break
        return [0.0, *found[:: max(1, math.ceil(len(found) / (most - 1)))]]


Axis = LinearAxis | LogAxis


def nice_step(at_least: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `at_least`."""
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= at_least * (1 - 1e-9))


def token_axis(columns: Sequence[Floats], *, log: bool) -> Axis:
    """The axis on which all columns of tokens lie; linear where a log axis would have no room."""
    tokens = np.concatenate([*columns, [0.0]])
    positive = tokens[tokens > 0]
    if not len(positive):
        return LinearAxis(0.0, 1.0)
    first, high = float(positive.min()), float(positive.max())
    return LogAxis(first, high) if log and high > first else LinearAxis(0.0, high)


def value_axis(columns: Sequence[Floats], fixed: tuple[float, float] | None, room: float = 0.07) -> LinearAxis:
    """An axis with a share of room above and below all values; NaN and infinity do not count."""
    if fixed is not None:
        return LinearAxis(*fixed)
    values = np.concatenate([*columns, np.empty(0)])
    values = values[np.isfinite(values)]
    if not len(values):
        return LinearAxis(0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    room = (high - low) * room or abs(high) * 0.1 or 1.0
    return LinearAxis(low - room, high + room)


def spread(places: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Move labels so that neighbours are `apart`, in their order, inside low..high where that can be; as little as a
    sweep down and a sweep up need."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = [places[number] for number in order]
    for number in range(1, len(moved)):
        moved[number] = max(moved[number], moved[number - 1] + apart)
    if moved and moved[-1] > high:
        moved[-1] = high
        for number in range(len(moved) - 2, -1, -1):
            moved[number] = min(moved[number], moved[number + 1] - apart)
    if moved and moved[0] < low:
        moved[0] = low
        for number in range(1, len(moved)):
            moved[number] = max(moved[number], moved[number - 1] + apart)
    result = [0.0] * len(places)
    for number, place in zip(order, moved, strict=True):
        result[number] = place
    return result


def picked(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of the numbers 0..count-1, dense at the start (for a log axis) and even to the end; 0 is one."""
    if count <= most:
        return np.arange(count)
    edges = np.concatenate([np.geomspace(1, count, most // 2), np.linspace(0, count, most // 2)])
    return np.unique(edges.astype(np.int64))[:-1]


def thinned(x: Floats, y: Floats, most: int = 500) -> tuple[Floats, Floats]:
    """A long line as means of bins, fine at the start (for a log axis) and even to the end; short ones as they are."""
    if len(x) <= most:
        return x, y
    starts = picked(len(x), most)
    known = np.isfinite(y)
    count = np.add.reduceat(known.astype(np.float64), starts)
    total = np.add.reduceat(np.where(known, y, 0.0), starts)
    means = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return np.add.reduceat(x, starts) / np.diff([*starts, len(x)]), means


def smoothed(y: Floats) -> Floats:
    """Centred means over windows that grow with the distance from the start, up to a 40th of the line.

    So the first steps stay what they were and the rest is calm. NaN does not count.
    """
    number = np.arange(len(y))
    half = np.minimum(np.minimum(number // 8, len(y) // 80), len(y) - 1 - number)
    known = np.isfinite(y)
    count = np.concatenate([[0], np.cumsum(known)])
    total = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    low, high = number - half, number + half + 1
    counted = count[high] - count[low]
    return np.divide(total[high] - total[low], counted, out=np.full(len(y), np.nan), where=counted > 0)
