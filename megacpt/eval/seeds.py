"""Two arms of an experiment, each run with a few seeds: the difference of their means and its t interval.

With three seeds a bootstrap has ten distinct resamples and an interval that is far too narrow; Student's t assumes
that differences are roughly normal and pays for the few seeds with its wide quantiles.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean of arm a minus mean of arm b.

    Attributes:
        low, high: its 95 % interval; None of a single seed, which has no spread.
        seeds: how many of each arm.
        method: "paired t" over differences of equal seeds, "Welch t" where seeds differ, "one seed".
    """

    mean: float
    low: float | None
    high: float | None
    seeds: tuple[int, int]
    method: str

    @property
    def significant(self) -> bool | None:
        """Whether the interval excludes zero; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0


def t_cdf(t: float, degrees: int) -> float:
    """P(T <= t) of Student's t, by the finite series for whole degrees of freedom (Abramowitz and Stegun 26.7.3-4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for number in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine * cosine * (number - 1) / number
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + inside / 2


def t_quantile(probability: float, degrees: int) -> float:
    """The t with P(T <= t) = probability, by bisection.

    Raises:
        ValueError: probability is outside [0.5, 1), or there are no degrees of freedom.
    """
    if not (0.5 <= probability < 1 and degrees >= 1):
        raise ValueError(f"no quantile of t at {probability} with {degrees} degrees of freedom")
    high = 1.0
    while t_cdf(high, degrees) < probability:
        high *= 2
    low = 0.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_cdf(middle, degrees) < probability else (low, middle)
    return high


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean of n values and the t interval of the mean, with n - 1 degrees of freedom; no interval of one value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None, None
    half = t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * math.sqrt(_variance(values) / len(values))
    return mean, mean - half, mean + half


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """Arm a minus arm b, by seed: paired where both have the same seeds, else Welch's.

    Args:
        a, b: seed -> value, at least one each.
    """
    seeds = len(a), len(b)
    if a.keys() == b.keys():
        mean, low, high = mean_interval([a[seed] - b[seed] for seed in sorted(a)])
        return Difference(mean, low, high, seeds, "one seed" if low is None else "paired t")
    first, second = list(a.values()), list(b.values())
    mean = math.fsum(first) / len(first) - math.fsum(second) / len(second)
    if min(seeds) < 2:
        return Difference(mean, None, None, seeds, "one seed")
    parts = [_variance(values) / len(values) for values in (first, second)]
    total = math.fsum(parts)
    if total == 0:
        return Difference(mean, mean, mean, seeds, "Welch t")
    # Of shares, not of variances, whose squares may be too small for a float.
    freedom = 1 / math.fsum((part / total) ** 2 / (n - 1) for part, n in zip(parts, seeds, strict=True))
    # Rounded down to whole degrees, which makes the interval wider, not narrower.
    half = t_quantile((1 + CONFIDENCE) / 2, max(1, math.floor(freedom))) * math.sqrt(total)
    return Difference(mean, mean - half, mean + half, seeds, "Welch t")


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
