"""How long documents are: exact statistics of many lengths, in memory that does not grow with them."""

from dataclasses import dataclass, field

import numpy as np

from megacpt.data.tokens.indexed import parts

LOW_BITS = 16


@dataclass(frozen=True)
class LengthStatistics:
    """Tokens per document, empty documents included.

    Attributes:
        median, p90, p99: the smallest length that at least this share of the documents does not exceed.
        histogram: documents by length: under "0" the empty ones, under 2^k those of 2^k to 2^(k+1) - 1 tokens.
    """

    min: int = 0
    mean: float = 0.0
    median: int = 0
    p90: int = 0
    p99: int = 0
    max: int = 0
    histogram: dict[str, int] = field(default_factory=dict)


def length_statistics(lengths: np.ndarray) -> LengthStatistics:
    """Statistics of int32 lengths [documents], which may be a memory map."""
    if not len(lengths):
        return LengthStatistics()
    high = np.zeros(1 << LOW_BITS, dtype=np.int64)
    powers = np.zeros(33, dtype=np.int64)
    total, least, most = 0, int(lengths[0]), 0
    for part in parts(lengths):
        high += np.bincount(part >> LOW_BITS, minlength=len(high))
        # frexp's exponent of n is the number of its binary digits.
        powers += np.bincount(np.frexp(part.astype(np.float64))[1], minlength=len(powers))
        total += int(part.sum(dtype=np.int64))
        least, most = min(least, int(part.min())), max(most, int(part.max()))
    median, p90, p99 = (_quantile(lengths, high, share) for share in (50, 90, 99))
    histogram = {str(1 << k >> 1): int(count) for k, count in enumerate(powers) if count}
    return LengthStatistics(least, round(total / len(lengths), 3), median, p90, p99, most, histogram)


def _quantile(lengths: np.ndarray, high: np.ndarray, percent: int) -> int:
    """The length of rank ceil(percent / 100 * documents), found by its upper 16 bits and then by its lower ones."""
    rank = -(-percent * len(lengths) // 100)
    below = np.cumsum(high)
    upper = int(np.searchsorted(below, rank))
    low = np.zeros(1 << LOW_BITS, dtype=np.int64)
    for part in parts(lengths):
        inside = part[part >> LOW_BITS == upper] & (len(low) - 1)
        low += np.bincount(inside, minlength=len(low))
    before = int(below[upper - 1]) if upper else 0
    return upper << LOW_BITS | int(np.searchsorted(np.cumsum(low), rank - before))
