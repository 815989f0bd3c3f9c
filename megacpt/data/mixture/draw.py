"""Where the i-th sample that a mixture takes of a source lies: in which shuffled pass over the source, and where there.

Without passes of the mixture a source is read pass after pass (`continue`). With them, every pass of the mixture takes
the same number of samples of a source, and `redraw` says which:

- `each_pass`: the first ones of a new shuffle, so that no document comes twice in a pass and passes differ (the
  "data-dynamic" mixture of arXiv 2406.14833);
- `once`: the samples of the first pass again, in another order ("data-fixed"); where the share changes within a run,
  the first ones of these samples, or these and those that follow;
- `continue`: those that follow in the source, so that nothing comes again before everything has come.

A pass of the mixture that takes more than the source has goes through several shuffles of it ("laps").
"""

from dataclasses import dataclass
from typing import Literal

from megacpt.data.keyed import bijection, seeded_key

Redraw = Literal["each_pass", "once", "continue"]


@dataclass(frozen=True)
class Draw:
    """One source's part in a mixture.

    Attributes:
        size: samples of one shuffled pass over the source; all full where the mixture has passes.
        position: samples of the source's own sequence of passes that are used up before this mixture.
        per_pass: samples in a pass of the mixture; None: the mixture has no passes.
        key: names the orders of `once`.
        fixed: the shuffled pass over the source with which the samples of `once` began in a former mixture, if any did.
    """

    size: int
    position: int = 0
    per_pass: int | None = None
    redraw: Redraw = "continue"
    key: int = 0
    fixed: int | None = None

    def locate(self, index: int) -> tuple[int, int]:
        """Sample `index` of the source in this mixture as (number of the shuffled pass, sample in it)."""
        if self.per_pass is None or self.redraw == "continue":
            return divmod(self.position + index, self.size)
        number, sample = divmod(index, self.per_pass)
        first = self.first
        if self.redraw == "each_pass":
            first += number * self.laps
        elif self._reordered(number):
            sample = bijection(seeded_key("once", self.key, number), self.per_pass, sample)
        lap, row = divmod(sample, self.size)
        return first + lap, row

    @property
    def first(self) -> int:
        """The shuffled pass over the source with which this mixture begins: one that no former mixture has begun,
        unless the samples are those of a former one."""
        return -(-self.position // self.size) if self.redraw != "once" or self.fixed is None else self.fixed

    def _reordered(self, number: int) -> bool:
        """Whether pass `number` of `once` is in another order than the shuffled pass over the source."""
        return number > 0 or self.fixed is not None

    def fixed_after(self, count: int) -> int | None:
        """`fixed` for a mixture that takes over after `count` samples of this one."""
        return self.first if self.redraw == "once" and self.per_pass is not None and count else self.fixed

    @property
    def laps(self) -> int:
        """Shuffled passes over the source that a pass of the mixture begins."""
        return -(-(self.per_pass or 0) // self.size)

    def position_after(self, count: int) -> int:
        """`position` for a mixture that takes over after `count` samples of this one."""
        if self.per_pass is None or self.redraw == "continue":
            return self.position + count
        if not count:
            return self.position
        number, sample = divmod(count, self.per_pass)
        begun = self.laps if self.redraw == "once" else number * self.laps - (-sample // self.size)
        return max(self.position, (self.first + begun) * self.size)

    def runs(self, lower: int, upper: int) -> list[tuple[int, int, int]]:
        """Samples [lower, upper) of the source in this mixture as (shuffled pass, first sample in it, end)."""
        if self.per_pass is None or self.redraw == "continue":
            return self._laps(0, self.position + lower, self.position + upper)
        runs: list[tuple[int, int, int]] = []
        while lower < upper:
            number, begin = divmod(lower, self.per_pass)
            end = min(self.per_pass, begin + upper - lower)
            if self.redraw == "each_pass":
                runs += self._laps(self.first + number * self.laps, begin, end)
            elif not self._reordered(number) or end - begin == self.per_pass:
                runs += self._laps(self.first, begin, end)
            else:
                places = sorted(self.locate(index) for index in range(lower, lower + end - begin))
                runs += [(lap, row, row + 1) for lap, row in places]
            lower += end - begin
        return runs

    def _laps(self, first: int, begin: int, end: int) -> list[tuple[int, int, int]]:
        """Samples [begin, end) of the shuffled passes from `first` on, cut where a pass ends."""
        laps = range(begin // self.size, -(-end // self.size))
        spans = [(lap, max(begin, lap * self.size), min(end, (lap + 1) * self.size)) for lap in laps]
        return [(first + lap, start - lap * self.size, stop - lap * self.size) for lap, start, stop in spans]
