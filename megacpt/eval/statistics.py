"""Means with bootstrap intervals: of a task, of a held-out set, of an unweighted mean of tasks, and of differences on
the same items."""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

Items = Mapping[str, tuple[float, float]]
"""Numerator and denominator by an item's key."""
RESAMPLES = 1000
LEVEL = 0.95

TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda ratio: ratio,
    "perplexity": lambda ratio: np.exp(-ratio),
    "bits": lambda ratio: -ratio / math.log(2),
}


@dataclass(frozen=True)
class Measure:
    """A metric by item: transform(sum of numerators / sum of denominators).

    Attributes:
        name: what the random draws follow from, so that two measures of one name and size are resampled alike.
        keys: what identifies each item.
        numerators, denominators: float64 [items].
        transform: a name in TRANSFORMS.
    """

    name: str
    keys: tuple[str, ...]
    numerators: np.ndarray
    denominators: np.ndarray
    transform: str = "mean"

    @property
    def value(self) -> float:
        """Over all items."""
        return float(self._of(np.array([math.fsum(self.numerators), math.fsum(self.denominators)])))

    def bootstrap(self) -> np.ndarray:
        """Values over resampled items, float64 [RESAMPLES]; the same draws for the same name and number of items."""
        items, parts = len(self.keys), np.stack([self.numerators, self.denominators], axis=1)
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), items])
        # One resample at a time: all of them at once are gigabytes where a held-out set has 100,000 samples.
        drawn = (np.bincount(rng.integers(items, size=items), minlength=items) for _ in range(RESAMPLES))
        return self._of(np.array([weights @ parts for weights in drawn]))

    def _of(self, sums: np.ndarray) -> np.ndarray:
        """The metric of sums [..., 2] of numerators and denominators, [...]."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return TRANSFORMS[self.transform](sums[..., 0] / sums[..., 1])


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % percentile interval; None of a single item, for there is nothing to resample."""

    value: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def estimate(measures: Sequence[Measure | Sequence[Measure]]) -> Estimate:
    """The unweighted mean of metrics; each resamples its own items. A sequence within is a mean of its own first.

    Percentile bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    values = [_mean([m.value for m in members]) for members in map(_members, measures)]
    draws = [np.mean([m.bootstrap() for m in members], axis=0) for members in map(_members, measures)]
    return _interval(_mean(values), np.mean(draws, axis=0), max(len(m.keys) for e in measures for m in _members(e)))


def difference(
    measures: Sequence[Measure | Sequence[Measure]], base: Mapping[str, Items]
) -> tuple[Estimate, int] | None:
    """`estimate` minus the same of `base` on the items that both have, resampled together; and how many those are.

    Args:
        base: by the measure's name. None is returned where it lacks a measure, or shares no item with one.
    """
    values, draws, items, most = [], [], 0, 0
    for members in map(_members, measures):
        pairs = [pair for m in members if (pair := _matched(m, base.get(m.name, {}))) is not None]
        if len(pairs) < len(members):
            return None
        values.append(_mean([now.value - before.value for now, before in pairs]))
        draws.append(np.mean([now.bootstrap() - before.bootstrap() for now, before in pairs], axis=0))
        counts = [len(now.keys) for now, _ in pairs]
        items, most = items + sum(counts), max(most, *counts)
    return _interval(_mean(values), np.mean(draws, axis=0), most), items


def _members(entry: Measure | Sequence[Measure]) -> Sequence[Measure]:
    return [entry] if isinstance(entry, Measure) else entry


def _matched(measure: Measure, base: Items) -> tuple[Measure, Measure] | None:
    """The measure and its counterpart of `base`, item by item."""
    kept = [number for number, key in enumerate(measure.keys) if key in base]
    if not kept:
        return None
    keys = tuple(measure.keys[number] for number in kept)
    parts = np.array([base[key] for key in keys], dtype=np.float64).T
    now = replace(measure, keys=keys, numerators=measure.numerators[kept], denominators=measure.denominators[kept])
    return now, replace(now, numerators=parts[0], denominators=parts[1])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _interval(value: float, draws: np.ndarray, most_items: int) -> Estimate:
    finite = draws[np.isfinite(draws)]
    if most_items < 2 or not len(finite):
        return Estimate(value, None, None)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))
