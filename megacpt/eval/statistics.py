"""Means with bootstrap intervals, of one task, of an unweighted mean of tasks, and of differences on the same items."""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

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
        name: what the random draws follow from, so that two measures of one name are resampled alike.
        keys: what identifies each item.
        numerators, denominators: float64 [items].
        transform: a name in TRANSFORMS.
    """

    name: str
    keys: tuple[str, ...]
    numerators: np.ndarray
    denominators: np.ndarray
    transform: str = "mean"

    def values(self, weights: np.ndarray) -> np.ndarray:
        """The metric under item weights, [resamples, items] -> [resamples]."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            ratio = (weights @ self.numerators) / (weights @ self.denominators)
            return TRANSFORMS[self.transform](ratio)

    @property
    def value(self) -> float:
        """Over all items."""
        return float(self.values(np.ones((1, len(self.keys))))[0])

    def bootstrap(self) -> np.ndarray:
        """Values over resampled items, float64 [RESAMPLES]; the same draws for the same name and number of items."""
        return self.values(_weights(self.name, len(self.keys)))

    def only(self, keys: set[str]) -> "Measure":
        """Restricted to some items."""
        kept = [number for number, key in enumerate(self.keys) if key in keys]
        return replace(
            self,
            keys=tuple(self.keys[number] for number in kept),
            numerators=self.numerators[kept],
            denominators=self.denominators[kept],
        )


def _weights(name: str, items: int) -> np.ndarray:
    rng = np.random.default_rng([zlib.crc32(name.encode()), items])
    return rng.multinomial(items, np.full(items, 1 / items), size=RESAMPLES).astype(np.float64)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % percentile interval; the interval is None where there is nothing to resample."""

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
    return _interval(_mean(values), np.mean(draws, axis=0))


def difference(
    measures: Sequence[Measure | Sequence[Measure]], base: Mapping[str, Measure]
) -> tuple[Estimate, int] | None:
    """`estimate` minus that of `base` on the items that both have, resampled together; and the number of those items.

    Args:
        base: by the measure's name. None is returned where it lacks a measure, or shares no item with one.
    """
    values, draws, items = [], [], 0
    for members in map(_members, measures):
        pairs = [pair for pair in (_matched(m, base.get(m.name)) for m in members) if pair is not None]
        if len(pairs) < len(members):
            return None
        values.append(_mean([a.value - b.value for a, b in pairs]))
        draws.append(np.mean([a.bootstrap() - b.bootstrap() for a, b in pairs], axis=0))
        items += sum(len(a.keys) for a, _ in pairs)
    return _interval(_mean(values), np.mean(draws, axis=0)), items


def _members(entry: Measure | Sequence[Measure]) -> Sequence[Measure]:
    return [entry] if isinstance(entry, Measure) else entry


def _matched(measure: Measure, base: Measure | None) -> tuple[Measure, Measure] | None:
    shared = set(measure.keys) & set(base.keys) if base is not None else set()
    if base is None or not shared:
        return None
    first, second = measure.only(shared), base.only(shared)
    order = {key: number for number, key in enumerate(second.keys)}
    lined_up = [order[key] for key in first.keys]
    return first, replace(
        second,
        keys=first.keys,
        numerators=second.numerators[lined_up],
        denominators=second.denominators[lined_up],
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _interval(value: float, draws: np.ndarray) -> Estimate:
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return Estimate(value, None, None)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))
