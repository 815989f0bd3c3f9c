"""Token sequences that begin alike share what they begin with: rows of a forward pass, each a small tree of tokens.

The answers to one question, the items of one few-shot prompt and equal requests differ in their ends only. A row holds
their common tokens once; a mask lets each token see its own ancestors, and its position is its depth. What comes out
at a token is what a row of its own would give, so this is prefix reuse without a key-value cache, at any layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

MIN_SHARED = 0.25
"""A sequence joins a row that has at least this part of it: attention costs a row's length squared."""


@dataclass(frozen=True)
class Row:
    """Tokens of one row of a batch, all int64 [n].

    Attributes:
        depths: a token's position in its own sequence.
        parents: index in the row of the token before it; -1 for a first token.
    """

    tokens: np.ndarray
    depths: np.ndarray
    parents: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_plain(self) -> bool:
        """Whether this is one sequence, for which a causal mask will do."""
        return bool((self.parents == np.arange(-1, len(self) - 1)).all())

    def hidden(self, size: int) -> np.ndarray:
        """Bool [size, size], True where token i must not see token j; rows past the end see themselves alone."""
        visible = np.eye(size, dtype=bool)
        for i, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                visible[i] |= visible[parent]
        return ~visible


@dataclass(frozen=True)
class Packed:
    """Rows, and where each of the sequences lies.

    Attributes:
        rows: longest first.
        row_of: row of each sequence.
        places: of each sequence, the index in its row of each of its tokens, int64 [tokens].
    """

    rows: list[Row]
    row_of: list[int]
    places: list[np.ndarray]


class _Growing:
    """A row while sequences are added in sorted order, so that the last path holds all that the next one can share."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.parents: list[int] = []
        self.path: list[int] = []
        self.members: list[int] = []
        self.paths: list[np.ndarray] = []

    def shared(self, sequence: Sequence[int]) -> int:
        """How many of its first tokens are here already."""
        pairs = zip(self.path, sequence, strict=False)
        return sum(1 for _ in takewhile(lambda pair: self.tokens[pair[0]] == pair[1], pairs))

    def add(self, sequence: Sequence[int], number: int) -> None:
        self.path = self.path[: self.shared(sequence)]
        for depth in range(len(self.path), len(sequence)):
            self.parents.append(self.path[-1] if self.path else -1)
            self.path.append(len(self.tokens))
            self.tokens.append(sequence[depth])
            self.depths.append(depth)
        self.members.append(number)
        self.paths.append(np.array(self.path))

    def row(self) -> Row:
        return Row(*(np.array(values, dtype=np.int64) for values in (self.tokens, self.depths, self.parents)))


def pack(sequences: Sequence[Sequence[int]], row_tokens: int) -> Packed:
    """Pack sequences (each of at least one token) into rows.

    Args:
        row_tokens: a row grows no longer than this by sharing; a longer sequence has a row of its own.
    """
    growing: list[_Growing] = []
    for number in sorted(range(len(sequences)), key=lambda i: list(sequences[i])):
        sequence = sequences[number]
        row = growing[-1] if growing else None
        shared = row.shared(sequence) if row is not None else 0
        more = len(sequence) - shared
        if row is None or (more and (shared < MIN_SHARED * len(sequence) or len(row.tokens) + more > row_tokens)):
            row = _Growing()
            growing.append(row)
        row.add(sequence, number)
    growing.sort(key=lambda row: -len(row.tokens))
    row_of = [0] * len(sequences)
    places: list[np.ndarray] = [np.empty(0)] * len(sequences)
    for index, row in enumerate(growing):
        for number, path in zip(row.members, row.paths, strict=True):
            row_of[number], places[number] = index, path
    return Packed([row.row() for row in growing], row_of, places)
