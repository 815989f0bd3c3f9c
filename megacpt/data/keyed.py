"""Random orders by name: what a key says is the same on every machine, in every version, for ever.

All random numbers are outputs of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014),
whose output function is a bijection of its state: keys to sort by never tie, and an order depends on no library's
random stream.
"""

import hashlib
import json

import numpy as np

GAMMA = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST = 31
MASK = (1 << 64) - 1
# As numpy has them, since making these takes as long as what they are for where there are few numbers.
NUMPY_GAMMA, NUMPY_LAST = np.uint64(GAMMA), np.uint64(LAST)
NUMPY_MIX = tuple((np.uint64(shift), np.uint64(factor)) for shift, factor in MIX)
STEPS = np.arange(1, 65, dtype=np.uint64) * NUMPY_GAMMA


def seeded_key(*parts: int | str) -> int:
    """A 64-bit key from integers and strings: the first 8 bytes of the SHA-256 of their JSON list."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "little")


def splitmix64(key: int, size: int, start: int = 0) -> np.ndarray:
    """Outputs [start, start + size) of the generator seeded with `key` in [0, 2^64): uint64 [size], all distinct."""
    before = np.uint64(key + start * GAMMA & MASK)
    few = size <= len(STEPS)
    state = (STEPS[:size] if few else np.arange(1, size + 1, dtype=np.uint64) * NUMPY_GAMMA) + before
    for shift, factor in NUMPY_MIX:
        state ^= state >> shift
        state *= factor
    state ^= state >> NUMPY_LAST
    return state


def permutation(key: int, size: int) -> np.ndarray:
    """The permutation of range(size) that `key` in [0, 2^64) names: int64 [size], stored."""
    return np.argsort(splitmix64(key, size))


def bijection(key: int, size: int, index: int) -> int:
    """Where `index` in range(size) goes under the permutation that `key` names, computed for it alone.

    A Feistel network of four rounds on the smallest square of a power of two that holds `size`, walked until the result
    lies in range (Black and Rogaway: Ciphers with Arbitrary Finite Domains, 2002).
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for round_ in range(4):
            left, right = right, left ^ (_mixed(key + (round_ << half | right) + 1) & low)
        index = left << half | right
        if index < size:
            return index


def _mixed(position: int) -> int:
    state = position * GAMMA & MASK
    for shift, factor in MIX:
        state = (state ^ state >> shift) * factor & MASK
    return state ^ state >> LAST
