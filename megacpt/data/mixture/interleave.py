"""Which source the k-th sample comes from: a closed form in integers instead of an index in memory.

Sources are the leaves of a balanced binary tree. A node that owns T items, L of them its first child's, has handed
floor((k*L + p) / T) of its first k items to that child, with a seeded phase p in [0, T). So a source gets its share
exactly after every T items, at any k it is less than one item per level of the tree away from it, and both questions,
where item k goes and how many of the first k went where, cost one walk from the root to the leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Union

from megacpt.data.keyed import seeded_key


@dataclass(frozen=True, slots=True)
class Fork:
    """A node: of every `total` items, `left` go to the first child and the others to the second; a leaf is an int."""

    left: int
    total: int
    phase: int
    first: Union["Fork", int]
    second: Union["Fork", int]

    def dealt(self, k: int) -> int:
        """How many of the node's first k items its first child got."""
        return (k * self.left + self.phase) // self.total


class Interleaving:
    """An endless sequence over sources in which every `sum(shares)` items hold exactly `shares`.

    The order of the arguments means nothing: the tree is built over sorted names.

    Args:
        names: of the sources, distinct.
        shares: non-negative integers, one a source; a source with share 0 never comes.
    """

    def __init__(self, names: Sequence[str], shares: Sequence[int], seed: int) -> None:
        self.size = len(names)
        leaves = sorted((source for source in range(self.size) if shares[source]), key=lambda source: names[source])

        def grow(part: list[int]) -> Fork | int:
            if len(part) == 1:
                return part[0]
            half = len(part) // 2
            left, total = (sum(shares[source] for source in sources) for sources in (part[:half], part))
            phase = seeded_key("phase", seed, *(names[source] for source in part)) % total
            return Fork(left, total, phase, grow(part[:half]), grow(part[half:]))

        self.root = grow(leaves)

    def locate(self, k: int) -> tuple[int, int]:
        """Item k as (source, how many items of that source came before)."""
        node = self.root
        while isinstance(node, Fork):
            before = node.dealt(k)
            node, k = (node.first, before) if node.dealt(k + 1) > before else (node.second, k - before)
        return node, k

    def counts(self, k: int) -> list[int]:
        """How many of the first k items each source got, in the order of `names`."""
        counts = [0] * self.size
        pending: list[tuple[Fork | int, int]] = [(self.root, k)]
        while pending:
            node, k = pending.pop()
            if isinstance(node, Fork):
                before = node.dealt(k)
                pending += [(node.first, before), (node.second, k - before)]
            else:
                counts[node] = k
        return counts
