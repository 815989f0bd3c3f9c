"""One pass over a corpus: a seeded shuffle of its documents, read as one stream of tokens and cut into samples.

A pass of T tokens under sequence length S has ceil((T - 1) / S) samples; sample r reads tokens [r*S, r*S + S + 1) of
the stream, so neighbours overlap by one and every token of the pass but its first is a target exactly once.

The shuffle sorts documents by SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014):
document d gets the (d + 1)-th output of the generator seeded with a hash of (seed, corpus, pass). The generator's
output function is a bijection of its state, so no two documents tie, the order depends on no sorting algorithm and no
library's random stream, and it is the same on every machine for ever.
"""

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

GAMMA = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def seeded_key(*parts: int | str) -> int:
    """A 64-bit key from integers and strings: the first 8 bytes of the SHA-256 of their JSON list."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "little")


def splitmix64(key: int, size: int) -> np.ndarray:
    """The first `size` outputs of the generator seeded with `key` in [0, 2^64): uint64 [size], all distinct."""
    state = np.arange(1, size + 1, dtype=np.uint64)
    state *= np.uint64(GAMMA)
    state += np.uint64(key)
    for shift, factor in MIX:
        state ^= state >> np.uint64(shift)
        state *= np.uint64(factor)
    state ^= state >> np.uint64(31)
    return state


def permutation(key: int, size: int) -> np.ndarray:
    """The permutation of range(size) that `key` in [0, 2^64) names: int64 [size]."""
    return np.argsort(splitmix64(key, size))


def samples_per_pass(tokens: int, seq_length: int) -> int:
    """Samples in which each of `tokens` tokens but the first is a target once; 0 for a corpus without targets."""
    return max(0, -(-(tokens - 1) // seq_length))


@dataclass(frozen=True)
class PassOrder:
    """The documents of one pass in the order of reading, empty ones left out.

    Attributes:
        documents: int64 [D].
        bounds: int64 [D + 1]; document i of the order holds tokens [bounds[i], bounds[i + 1]) of the stream.
    """

    documents: np.ndarray
    bounds: np.ndarray

    def pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Tokens [start, stop) of the stream as (document, first token, end); less where the stream ends before."""
        stop = min(stop, int(self.bounds[-1]))
        first = int(np.searchsorted(self.bounds, start, side="right")) - 1
        last = int(np.searchsorted(self.bounds, stop, side="left"))
        bounds = self.bounds[first : last + 1].tolist()
        return [
            (document, max(start, begin) - begin, min(stop, end) - begin)
            for document, (begin, end) in zip(self.documents[first:last].tolist(), pairwise(bounds), strict=True)
        ]


def shuffled_pass(lengths: np.ndarray, seed: int, name: str, number: int) -> PassOrder:
    """Pass `number` over the corpus `name`: a pure function of the arguments.

    Args:
        lengths: int64 [documents], tokens of each document.
    """
    documents = permutation(seeded_key("pass", seed, name, number), len(lengths))
    documents = documents[lengths[documents] > 0]
    bounds = np.zeros(len(documents) + 1, dtype=np.int64)
    np.cumsum(lengths[documents], out=bounds[1:])
    return PassOrder(documents, bounds)
