"""The stability gap in numbers: how far a curve of ability falls after training begins, for how long, and what is left.

Everything is defined on g, the gain over step 0: value minus value at step 0, with the sign turned where lower is
better. Between evaluations g is taken as linear in tokens. docs/stability.md has the definitions with a figure.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
UNKNOWN = math.nan


class Point(NamedTuple):
    """One evaluation: after `iteration` steps and `tokens` trained on; low and high are its 95 % interval."""

    iteration: int
    tokens: float
    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """A metric over training, in the order of training.

    Attributes:
        iteration: int64 [n], strictly increasing.
        tokens: float64 [n], tokens trained on; not decreasing.
        value: float64 [n], finite.
        low, high: float64 [n], the 95 % interval, NaN where there is none.
        dropped: evaluations left out because their value is missing or not finite.
    """

    iteration: Integers
    tokens: Floats
    value: Floats
    low: Floats
    high: Floats
    higher_is_better: bool
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.iteration)

    @property
    def gain(self) -> Floats:
        """g, float64 [n]: better than at step 0 is positive. Needs an evaluation at step 0."""
        return (self.value - self.value[0]) * (1.0 if self.higher_is_better else -1.0)

    def mark(self, at: int) -> "Mark":
        """The evaluation with number `at`."""
        return Mark(
            int(self.iteration[at]),
            float(self.tokens[at]),
            float(self.value[at]),
            float(self.low[at]),
            float(self.high[at]),
        )


@dataclass(frozen=True)
class Mark:
    """An evaluation that is singled out; low and high are NaN where it has no interval."""

    iteration: int
    tokens: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Gap:
    """The numbers of one curve. `None` where the curve cannot say.

    Attributes:
        start: the evaluation at step 0; without it nothing below has a reference.
        worst, best, final: worst and best evaluation (the first of equals) and the last one.
        depth: how far the worst lies below step 0 in the direction of worse, in the metric's unit; never negative.
        depth_is_significant: whether that is more than chance, by `basis`.
        basis: "paired" (the paired interval of worst minus step 0 excludes zero), "interval" (the worst value lies
            outside the interval of step 0) or "none" (neither is known, or there is no dip).
        area: of the curve below the level of step 0, in the metric's unit x tokens.
        tokens_to_recovery: tokens from step 0 until g is back at zero after the worst; 0 without a dip, None if never.
        delta: final minus start, in the metric's own sign.
        delta_is_significant: as for the depth, for the final evaluation.
    """

    start: Mark | None
    worst: Mark
    best: Mark
    final: Mark
    depth: float | None
    depth_is_significant: bool | None
    basis: str
    area: float | None
    tokens_to_recovery: float | None
    delta: float | None
    delta_is_significant: bool | None

    @property
    def dipped(self) -> bool:
        """Whether the curve ever was worse than at step 0."""
        return bool(self.depth)

    @property
    def recovered(self) -> bool:
        """Whether the curve came back to its level of step 0, or never left it."""
        return self.tokens_to_recovery is not None


def make_curve(points: Iterable[Point], *, higher_is_better: bool) -> Curve:
    """A curve from evaluations in any order.

    Of several with one iteration the last given counts: it is what a resumed run wrote anew.
    """
    newest = {point.iteration: point for point in points}
    usable = [point for _, point in sorted(newest.items()) if point.value is not None and math.isfinite(point.value)]

    def column(values: Iterable[float | None]) -> Floats:
        return np.array([UNKNOWN if value is None else value for value in values], np.float64)

    return Curve(
        iteration=np.array([point.iteration for point in usable], np.int64),
        tokens=column(point.tokens for point in usable),
        value=column(point.value for point in usable),
        low=column(point.low for point in usable),
        high=column(point.high for point in usable),
        higher_is_better=higher_is_better,
        dropped=len(newest) - len(usable),
    )


def gap(curve: Curve, paired: Mapping[int, bool] | None = None) -> Gap | None:
    """The numbers of a curve; None of an empty one.

    Args:
        paired: iteration -> whether a paired comparison with step 0 on the same items found a difference. It is
            preferred to intervals, which know nothing of the items that two evaluations share.
    """
    if not len(curve):
        return None
    better = curve.value if curve.higher_is_better else -curve.value
    worst, best, final = int(np.argmin(better)), int(np.argmax(better)), len(curve) - 1
    marks = (curve.mark(worst), curve.mark(best), curve.mark(final))
    if curve.iteration[0] != 0:
        return Gap(None, *marks, None, None, "none", None, None, None, None)
    gain = curve.gain
    depth = max(0.0, -float(gain[worst]))
    significant, basis = _differs(curve, worst, paired or {}) if depth else (False, "none")
    return Gap(
        curve.mark(0),
        *marks,
        depth,
        significant,
        basis,
        area_below(curve.tokens, gain),
        tokens_to_recovery(curve.tokens, gain, worst),
        float(curve.value[final] - curve.value[0]),
        _differs(curve, final, paired or {})[0],
    )


def _differs(curve: Curve, at: int, paired: Mapping[int, bool]) -> tuple[bool | None, str]:
    """Whether an evaluation differs from step 0, and how that is known."""
    iteration = int(curve.iteration[at])
    if iteration == 0:
        return False, "none"
    if iteration in paired:
        return paired[iteration], "paired"
    low, high = curve.low[0], curve.high[0]
    if math.isnan(low) or math.isnan(high):
        return None, "none"
    return not low <= curve.value[at] <= high, "interval"


def area_below(tokens: Floats, gain: Floats) -> float:
    """Area between zero and the parts of a piecewise linear curve below zero: the trapezoid rule, cut at crossings."""
    step, left, right = np.diff(tokens), gain[:-1], gain[1:]
    below = np.minimum(left, 0) + np.minimum(right, 0)
    crosses = (left < 0) != (right < 0)
    # Of a segment that crosses zero only a share is below: as much as its lower end is of its whole rise.
    share = np.divide(-below, np.abs(left - right), out=np.ones_like(below), where=crosses & (left != right))
    return float(np.sum(-below / 2 * share * step))


def tokens_to_recovery(tokens: Floats, gain: Floats, worst: int) -> float | None:
    """Tokens at which the curve, linear between its points, first is back at zero at or after point `worst`."""
    back = np.flatnonzero(gain[worst:] >= 0)
    if not len(back):
        return None
    after = worst + int(back[0])
    if after == worst:
        return 0.0
    share = -gain[after - 1] / (gain[after] - gain[after - 1])
    return float(tokens[after - 1] + share * (tokens[after] - tokens[after - 1]) - tokens[0])
