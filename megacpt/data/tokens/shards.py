"""One corpus, encoded by several jobs: which part of the inputs is whose, decided by the sizes of the files alone."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from megacpt.data.text.documents import Source
from megacpt.errors import UserError

SLACK = 4
"""A cut moves to the nearest edge of a file within 1 / SLACK of a shard, so that most files are read by one job."""
MOST = 99_999
"""Shards; their names have five digits, by which they are sorted."""


@dataclass(frozen=True)
class Shard:
    """The `index`-th (from 0) of `count` jobs that encode one corpus between them."""

    index: int = 0
    count: int = 1

    @property
    def suffix(self) -> str:
        """What is appended to the name of a dataset that is one of several."""
        return f".shard-{self.index:05d}-of-{self.count:05d}" if self.count > 1 else ""


WHOLE = Shard()


def parse_shard(text: str) -> Shard:
    """`i/n`, 0 <= i < n.

    Raises:
        UserError: anything else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard {text}: give I/N, with I from 0 to N - 1: 0/8, 1/8, ... 7/8")
    if int(match[2]) > MOST:
        raise UserError(f"--shard {text}: there are at most {MOST:,} shards")
    return Shard(int(match[1]), int(match[2]))


def cuts(sizes: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Where each of `count` shards begins, and where the last ends: (file, byte of it), by the sizes of files on disk.

    Shards are of about equal size. Byte 0 stands for the edge between a file and the one before.
    """
    edges = [0, *accumulate(sizes)]
    total = edges[-1]
    found = [(0, 0)]
    for index in range(1, count):
        at = total * index // count
        after = bisect_left(edges, at)
        # Files of no bytes share an edge; the first of them begins the shard.
        near = min(edges[max(0, after - 1)], edges[after], key=lambda edge: abs(edge - at))
        if abs(near - at) * SLACK * count <= total:
            found.append((bisect_left(edges, near), 0))
        else:
            found.append((after - 1, at - edges[after - 1]))
    return [*found, (len(sizes), 0)]


def share(paths: Sequence[Path], shard: Shard) -> tuple[int, list[Source]]:
    """The number of the first file that a shard reads, and its files or parts of files in order."""
    if shard.count == 1:
        return 0, [Source(path) for path in paths]
    sizes = [Source(path).size for path in paths]
    found = cuts(sizes, shard.count)
    (first, begin), (last, end) = found[shard.index], found[shard.index + 1]
    whole = [Source(path, begin if number == first else 0) for number, path in enumerate(paths[first:last], first)]
    if end == 0:
        return first, whole
    return first, [*whole, Source(paths[last], begin if last == first else 0, end)]
