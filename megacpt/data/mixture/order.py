"""One pass over a corpus: a keyed permutation of its documents, computed where they are many, read as one stream of
tokens and cut into samples.

A pass of T tokens under sequence length S has ceil((T - 1) / S) samples; sample r reads tokens [r*S, r*S + S + 1) of
the stream, so neighbours overlap by one and every token of the pass but its first is a target exactly once.

Of up to 16,384 documents the permutation is stored, 4 bytes each. More, D of them, are dealt into B = ceil(D / 64)
buckets. Document d = 64 j + i goes to bucket
(a_i j + s_i) mod B, where a_i, coprime to B, and s_i are drawn for each of the 64 residues i and for each pass: within
a residue that is a bijection, so every bucket gets one document of each, from anywhere in the corpus. Buckets are read
in a shuffled order, and so is each one's content. What is kept of a pass is the buckets' order and their cumulative
tokens: 12 bytes for 64 documents; a document's place inside its bucket is worked out when a sample is read there. Two
documents of one residue never share a bucket, which where buckets are few would keep them apart: hence the first way.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megacpt.data.keyed import permutation, seeded_key, splitmix64

BUCKET = 64
"""Documents of a bucket: few enough to sort in microseconds, enough for a pass to be small in memory."""
STORED = 1 << 14
"""Documents whose permutation is stored at most: 64 KB a pass."""
RESIDUES = np.arange(BUCKET)
BLOCK = 1 << 20
"""Documents whose lengths are added up at a time."""


def samples_per_pass(tokens: int, seq_length: int) -> int:
    """Samples in which each of `tokens` tokens but the first is a target once; 0 for a corpus without targets."""
    return max(0, -(-(tokens - 1) // seq_length))


class Buckets(Protocol):
    """The documents of one pass in groups of up to BUCKET, which are read one after the other.

    Attributes:
        reading: int32 [B], the order in which buckets are read.
    """

    @property
    def reading(self) -> np.ndarray: ...

    def members(self, buckets: np.ndarray) -> np.ndarray:
        """All documents of int64 [n] buckets, in no particular order: int64 [up to n * BUCKET]."""
        ...

    def content(self, bucket: int) -> np.ndarray:
        """The documents of a bucket in the order of reading: int64 [up to BUCKET]."""
        ...

    def tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens of each bucket, of documents of these lengths: int64 [B]."""
        ...


@dataclass(frozen=True)
class Stored:
    """All documents, written down in their order.

    Attributes:
        order: int32 [documents].
    """

    order: np.ndarray

    @property
    def reading(self) -> np.ndarray:
        return np.arange(-(-len(self.order) // BUCKET), dtype=np.int32)

    def members(self, buckets: np.ndarray) -> np.ndarray:
        places = (buckets[:, None] * BUCKET + RESIDUES).reshape(-1)
        return self.order[places[places < len(self.order)]].astype(np.int64)

    def content(self, bucket: int) -> np.ndarray:
        return self.order[bucket * BUCKET : (bucket + 1) * BUCKET].astype(np.int64)

    def tokens(self, lengths: np.ndarray) -> np.ndarray:
        return np.add.reduceat(lengths[self.order], np.arange(0, len(self.order), BUCKET), dtype=np.int64)


@dataclass(frozen=True)
class Deal:
    """Documents dealt to buckets by computation.

    Attributes:
        documents, buckets: how many there are.
        reading: the order of buckets.
        factors, inverses, shifts: int64 [BUCKET], of the map of each residue and of its inverse.
        key: orders the documents inside a bucket.
    """

    documents: int
    buckets: int
    reading: np.ndarray
    factors: np.ndarray
    inverses: np.ndarray
    shifts: np.ndarray
    key: int

    def buckets_of(self, columns: np.ndarray) -> np.ndarray:
        """The buckets of documents BUCKET * j + i for int64 [n] columns j and all residues i: int64 [n, BUCKET]."""
        places = columns[:, None] * self.factors
        places += self.shifts
        # numpy divides by a scalar several times faster than it takes the remainder.
        places -= places // self.buckets * self.buckets
        return places

    def members(self, buckets: np.ndarray) -> np.ndarray:
        columns = (buckets[:, None] - self.shifts) * self.inverses % self.buckets
        documents = (columns * BUCKET + RESIDUES).reshape(-1)
        return documents[documents < self.documents]

    def content(self, bucket: int) -> np.ndarray:
        columns = (bucket - self.shifts) * self.inverses % self.buckets
        order = splitmix64(self.key, BUCKET, bucket * BUCKET).argsort()
        documents = (columns * BUCKET + RESIDUES)[order]
        return documents[documents < self.documents]

    def tokens(self, lengths: np.ndarray) -> np.ndarray:
        totals = np.zeros(self.buckets)
        for start in range(0, len(lengths), BLOCK):
            block = lengths[start : start + BLOCK]
            columns = np.arange(start // BUCKET, -(-(start + len(block)) // BUCKET))
            places = self.buckets_of(columns).reshape(-1)[: len(block)]
            totals += np.bincount(places, weights=block, minlength=self.buckets)
        # Sums of floats, exact below 2^53.
        return totals.astype(np.int64)


def deal(key: int, documents: int) -> Deal:
    """The deal that `key` names for a corpus of `documents`."""
    buckets = max(1, -(-documents // BUCKET))
    draws = splitmix64(seeded_key("deal", key), 2 * BUCKET) % np.uint64(buckets)
    factors, shifts = draws[:BUCKET].astype(np.int64), draws[BUCKET:].astype(np.int64)
    while (wrong := np.gcd(factors, buckets) != 1).any():
        factors[wrong] = (factors[wrong] + 1) % buckets if buckets > 1 else 1
    inverses = np.array([pow(int(factor), -1, buckets) if buckets > 1 else 0 for factor in factors])
    reading = permutation(seeded_key("buckets", key), buckets).astype(np.int32)
    return Deal(documents, buckets, reading, factors, inverses, shifts, seeded_key("inside", key))


def arrange(key: int, documents: int) -> Buckets:
    """The permutation of `documents` that `key` names."""
    if documents <= STORED:
        return Stored(permutation(key, documents).astype(np.int32))
    return deal(key, documents)


class PassOrder:
    """The documents of one pass in the order of reading; empty ones have no place in the stream of tokens.

    Args:
        lengths: integers [documents], tokens of each document; a memory map will do.
        key: in [0, 2^64), names the permutation.

    Attributes:
        arranged: the documents in buckets.
        buckets: int32 [B], the order in which buckets are read.
        bounds: int64 [B + 1]; bucket buckets[b] holds tokens [bounds[b], bounds[b + 1]) of the stream.
    """

    def __init__(self, lengths: np.ndarray, key: int) -> None:
        self.lengths = lengths
        self.arranged = arrange(key, len(lengths))
        self.buckets = self.arranged.reading
        self.bounds = np.zeros(len(self.buckets) + 1, dtype=np.int64)
        np.cumsum(self.arranged.tokens(lengths)[self.buckets], out=self.bounds[1:])

    @property
    def documents(self) -> np.ndarray:
        """All documents that have tokens, in order: int64 [D]."""
        whole = np.concatenate([self.arranged.content(bucket) for bucket in self.buckets.tolist()])
        return whole[self.lengths[whole] > 0]

    def pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Tokens [start, stop) of the stream as (document, first token, end); less where the stream ends before."""
        stop = min(stop, int(self.bounds[-1]))
        pieces: list[tuple[int, int, int]] = []
        place = int(self.bounds.searchsorted(start, side="right")) - 1
        while start < stop:
            base = int(self.bounds[place])
            content = self.arranged.content(int(self.buckets[place]))
            ends = np.add.accumulate(self.lengths[content], dtype=np.int64).tolist()
            first = bisect_right(ends, start - base)
            last = bisect_left(ends, stop - base) + 1
            begin = base + (ends[first - 1] if first else 0)
            for document, end in zip(content[first:last].tolist(), ends[first:last], strict=True):
                if begin < base + end:
                    pieces.append((document, max(start, begin) - begin, min(stop, base + end) - begin))
                begin = base + end
            start, place = max(start, begin), place + 1
        return pieces

    def whole(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """The documents of the buckets that lie within tokens [start, stop) entirely, some at a time, in any order."""
        first, last = self._inside(start, stop)
        for place in range(first, last, BLOCK // BUCKET):
            yield self.arranged.members(self.buckets[place : min(last, place + BLOCK // BUCKET)].astype(np.int64))

    def edges(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The pieces of tokens [start, stop) that `whole` leaves out."""
        first, last = self._inside(start, stop)
        if first == last:
            return self.pieces(start, stop)
        return self.pieces(start, int(self.bounds[first])) + self.pieces(int(self.bounds[last]), stop)

    def _inside(self, start: int, stop: int) -> tuple[int, int]:
        first = int(self.bounds.searchsorted(start, side="left"))
        return first, max(first, int(self.bounds.searchsorted(stop, side="right")) - 1)


def shuffled_pass(lengths: np.ndarray, seed: int, name: str, number: int) -> PassOrder:
    """Pass `number` over the corpus `name`: a pure function of the arguments."""
    return PassOrder(lengths, seeded_key("pass", seed, name, number))
