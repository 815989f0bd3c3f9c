"""Which rows of a corpus become documents: the one filter that encoding and scoring share.

The first key's text is the document's: the filters look at it, and a row is kept or dropped with all its keys.
In this order: bad rows (skipped on request), texts that are too short, texts that an earlier row had.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import compress
from pathlib import Path

import numpy as np

from megacpt.data.text.documents import Block, Source
from megacpt.data.text.long_string import LongString
from megacpt.data.text.provenance import Filters
from megacpt.data.text.rows import parse_block, texts_of

DEDUP = ("none", "exact")
DIGEST_BYTES = 16
TOO_SHORT, DUPLICATES = "too_short", "duplicates"
FILTERED = {TOO_SHORT, DUPLICATES}
"""Kinds of rows dropped that are not bad rows."""
FULLEST = 0.75
"""The share of slots in use at which the table of digests doubles: at most 1 / 0.375 slots a digest."""

AT_ONCE = 1 << 18


def kept_rows(
    block: Block, keys: Sequence[str], filters: Filters, counts: Counter[str]
) -> Iterator[tuple[str, list[str]]]:
    """Rows of one block as (where, [text of each key]) after every filter but `dedup`, which needs the rows before.

    Args:
        counts: counts what is dropped, by kind: those of `parse_block`, and too_short.

    Raises:
        UserError: a bad row, unless they are to be skipped.
    """
    for where, texts in parse_block(block, keys, counts if filters.skip_invalid else None):
        if len(texts[0]) < filters.min_chars:
            counts[TOO_SHORT] += 1
        else:
            yield where, texts


def kept_columns(
    block: Block, keys: Sequence[str], filters: Filters, counts: Counter[str]
) -> list[list[str | LongString]]:
    """The texts of `kept_rows`, key by key: [keys][rows]; faster, and with very long ones where they lie."""
    columns = texts_of(block, keys, counts if filters.skip_invalid else None)
    keep = [len(text) >= filters.min_chars for text in columns[0]] if filters.min_chars else [True]
    if all(keep):
        return columns
    counts[TOO_SHORT] += keep.count(False)
    return [list(compress(texts, keep)) for texts in columns]


def digests_of(texts: Sequence[str | LongString]) -> np.ndarray:
    """BLAKE2b of each text in 128 bits, uint64 [texts, 2]. Two texts are taken for equal when these are."""
    return np.frombuffer(b"".join(map(_digest, texts)), dtype="<u8").reshape(-1, 2)


def _digest(text: str | LongString) -> bytes:
    found = blake2b(digest_size=DIGEST_BYTES)
    for piece in (text,) if isinstance(text, str) else text.pieces():
        found.update(piece.encode("utf-8"))
    return found.digest()


class DigestSet:
    """The digests seen so far, in an open hash table with two hashes: 21 to 43 bytes a digest, and half as much again
    while it doubles."""

    def __init__(self) -> None:
        self._count = 0
        self._slots = np.zeros((1 << 12, 2), dtype=np.uint64)

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self._slots.nbytes

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Take in digests uint64 [N, 2]; bool [N]: whether each is the first of its kind, also among these N."""
        while self._count + len(digests) > FULLEST * len(self._slots):
            self._double()
        first = self._insert(digests)
        self._count += int(first.sum())
        return first

    def _double(self) -> None:
        old, self._slots = self._slots, np.zeros((2 * len(self._slots), 2), dtype=np.uint64)
        for start in range(0, len(old), AT_ONCE):
            part = old[start : start + AT_ONCE]
            self._insert(part[part.any(axis=1)])

    def _insert(self, digests: np.ndarray) -> np.ndarray:
        """Put in digests; bool [N]: whether each was not there yet, nor among these before it."""
        new = np.zeros(len(digests), dtype=bool)
        # An empty slot is zero, so the digest zero is kept as one.
        digests = np.where(digests.any(axis=1, keepdims=True), digests, np.uint64(1))
        mask = np.uint64(len(self._slots) - 1)
        waiting = np.arange(len(digests))
        slots = digests[:, 0] & mask
        steps = digests[:, 1] | np.uint64(1)
        while len(waiting):
            found = self._slots[slots]
            empty = ~found.any(axis=1)
            self._slots[slots[empty]] = digests[waiting[empty]]
            # Of several that want one empty slot the last has it; the others find it there and go on.
            settled = (self._slots[slots] == digests[waiting]).all(axis=1)
            fresh = np.flatnonzero(settled & empty)
            new[waiting[fresh[np.unique(slots[fresh], return_index=True)[1]]]] = True
            left = ~settled
            waiting, slots, steps = waiting[left], (slots[left] + steps[left]) & mask, steps[left]
        return new


def iter_documents(
    paths: Sequence[Path], keys: Sequence[str], filters: Filters, counts: Counter[str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """The documents that encoding the same files with the same keys and filters writes, in its order.

    Yields (where, [text of each key]): `where` is FILE:LINE. `counts`, if given, counts the rows dropped, by kind.

    Raises:
        UserError: a file that cannot be read; a bad row, unless they are to be skipped.
    """
    counts = Counter() if counts is None else counts
    seen = DigestSet() if filters.dedup == "exact" else None
    for path in paths:
        for block in Source(path).blocks(keys):
            rows = list(kept_rows(block, keys, filters, counts))
            new = seen.add(digests_of([texts[0] for _, texts in rows])) if seen else np.ones(len(rows), dtype=bool)
            if not new.all():
                counts[DUPLICATES] += int((~new).sum())
            yield from (row for row, keep in zip(rows, new, strict=True) if keep)
