"""How the rows of a fused tensor are made of rows of Hugging Face tensors: pure arithmetic on intervals.

A layout is a list of spans; laid end to end they are the rows of the fused tensor. Import asks which rows an interval
of the fused tensor needs (`cut`); export asks where the rows of one part lie (`places`).
"""

from collections.abc import Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """Rows [start, stop) of part number `part`."""

    part: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start


class Place(NamedTuple):
    """Rows [start, stop) of the fused tensor, which are the rows from `part_start` on of a part."""

    start: int
    stop: int
    part_start: int


Layout = Sequence[Span]


def stacked(rows: Sequence[int]) -> Layout:
    """Whole parts one below the other; with one part, that part itself."""
    return [Span(part, 0, count) for part, count in enumerate(rows)]


def grouped(rows: Sequence[int], groups: int) -> Layout:
    """Every part in `groups` equal pieces, dealt in turn: with q, k and v, each query group's q heads, its k, its v.

    This is the row order of Megatron's fused query/key/value projection.
    """
    assert all(count % groups == 0 for count in rows)
    pieces = [count // groups for count in rows]
    return [Span(part, g * n, (g + 1) * n) for g in range(groups) for part, n in enumerate(pieces)]


def cut(layout: Layout, start: int, stop: int) -> list[Span]:
    """The spans that rows [start, stop) of the fused tensor are made of, in order; rows past its end give none."""
    found, position = [], 0
    for span in layout:
        low, high = max(start - position, 0), min(stop - position, span.rows)
        if low < high:
            found.append(Span(span.part, span.start + low, span.start + high))
        position += span.rows
    return found


def places(layout: Layout, part: int) -> list[Place]:
    """Where the rows of one part lie in the fused tensor, in the fused tensor's order."""
    found, position = [], 0
    for span in layout:
        if span.part == part:
            found.append(Place(position, position + span.rows, span.start))
        position += span.rows
    return found
