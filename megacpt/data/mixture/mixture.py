"""A solved mixture: how many samples of each source there are, and which sample is the k-th of the run.

A mixture has passes, or epochs, or neither. With passes, each of them holds a fixed number of samples of every source.
With `epochs` anywhere, sources with epochs give exactly that many passes over themselves, and sources with a weight
fill their share of the total, N = (samples of the epochs) / (1 - sum of weights). Both kinds end; samples from there
on, which only complete the last global batch, are the largest source's. With weights alone there is no end: the shares
do not depend on the budget, so a longer run begins as the shorter one did.

Where weights change within a run, it is a row of segments, each of which takes over from the one before.

The k-th sample depends on the sources, seq_length, the seed and k; not on the batch size, the budget or who asks.
Nothing here reads a file.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

from megacpt.data.mixture.draw import Draw, Redraw
from megacpt.data.mixture.interleave import Interleaving
from megacpt.data.mixture.order import samples_per_pass
from megacpt.errors import UserError

ALGORITHM = 3
"""Raised whenever the same configuration would give another sequence of samples."""


@dataclass(frozen=True)
class Source:
    """A corpus and what the configuration asks of it: `epochs` (exact passes) or `weight` (a share of the samples).

    Attributes:
        documents, tokens: its size; of the subset, where only one is read.
        digest: identifies its content wherever it lies; compared when a run resumes.
        redraw: where the mixture has passes, what each of them takes; see `megacpt.data.mixture.draw`.
        repeat: a pass may take more than the source has.
    """

    name: str
    documents: int
    tokens: int
    digest: str = ""
    epochs: int | None = None
    weight: float | None = None
    redraw: Redraw = "each_pass"
    repeat: bool = False


@dataclass(frozen=True)
class Budget:
    """How long to train, from sample 0 of the run on, in one of three units; rounded up to whole global batches."""

    train_iters: int | None = None
    train_samples: int | None = None
    train_tokens: int | None = None

    def given(self) -> tuple[str, int] | None:
        """(unit, amount), or None where there is no budget."""
        given = [(unit, amount) for unit, amount in vars(self).items() if amount is not None]
        if len(given) > 1:
            raise UserError(f"train: {' and '.join(unit for unit, _ in given)} are both set; keep one of them")
        if given and given[0][1] <= 0:
            raise UserError(f"train.{given[0][0]}: {given[0][1]:,} is not a positive number")
        return given[0] if given else None

    def steps(self, seq_length: int, global_batch_size: int) -> int | None:
        """The budget in iterations; None where there is none."""
        given = self.given()
        if given is None:
            return None
        unit, amount = given
        batch = global_batch_size
        return -(-amount // {"train_iters": 1, "train_samples": batch, "train_tokens": batch * seq_length}[unit])


@dataclass(frozen=True)
class Passes:
    """Passes of the mixture: `number` of them, of `samples` samples each."""

    samples: int
    number: int


@dataclass(frozen=True)
class Shift:
    """From global sample `sample` of the run on, the sources' weights are these."""

    sample: int
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Course:
    """What a mixture does over time; by default nothing."""

    passes: Passes | None = None
    shifts: tuple[Shift, ...] = ()


@dataclass(frozen=True)
class Start:
    """Where a mixture takes over from another one: at global sample `sample`.

    Attributes:
        consumed: samples of each source before. It also remembers sources that the mixture no longer has, so that they
            can come back.
        position: where each source goes on, in samples of its own sequence of passes; as many as are consumed, unless
            it was drawn in parts.
        fixed: of sources that are drawn `once`, the shuffled pass with which their samples began.
    """

    sample: int = 0
    consumed: Mapping[str, int] = field(default_factory=dict)
    position: Mapping[str, int] | None = None
    fixed: Mapping[str, int] = field(default_factory=dict)

    def position_of(self, name: str) -> int:
        """Where the source `name` goes on."""
        return (self.consumed if self.position is None else self.position).get(name, 0)


@dataclass(frozen=True)
class Segment:
    """A stretch of the run in which the weights stay what they are.

    Attributes:
        counts: samples of each source within `samples`, in the order of `sources`.
        samples: samples from `start.sample` on, before the last batch is filled.
        draws: where each source's samples lie.
        ends: whether nothing follows but what fills the last batch.
    """

    sources: tuple[Source, ...]
    start: Start
    interleaving: Interleaving
    draws: tuple[Draw, ...]
    counts: tuple[int, ...]
    samples: int
    ends: bool

    @property
    def largest(self) -> int:
        """The source with most samples, which fills the last global batch; of equals the first by name."""
        return min(range(len(self.sources)), key=lambda i: (-self.counts[i], self.sources[i].name))

    def locate(self, k: int) -> tuple[int, int, int]:
        """Global sample k as (source, number of a shuffled pass over it, sample in that pass)."""
        item = k - self.start.sample
        if self.ends and item >= self.samples:
            source, index = self.largest, self.counts[self.largest] + item - self.samples
        else:
            source, index = self.interleaving.locate(item)
        return source, *self.draws[source].locate(index)

    def taken(self, k: int) -> list[int]:
        """Samples of each source between the segment's start and global sample k, in the order of `sources`."""
        item = k - self.start.sample
        inside = min(item, self.samples) if self.ends else item
        counts = self.interleaving.counts(inside)
        counts[self.largest] += item - inside
        return counts

    def consumed(self, k: int) -> dict[str, int]:
        """Samples of each source among the run's first k, those of former sources included."""
        before = self.start.consumed
        now = {s.name: before.get(s.name, 0) + n for s, n in zip(self.sources, self.taken(k), strict=True)}
        return {**before, **now}

    def at(self, k: int) -> Start:
        """Where another segment takes over at global sample k."""
        taken, before = self.taken(k), self.start
        names = [source.name for source in self.sources]
        position = {**before.consumed, **(before.position or {})}
        position |= {n: d.position_after(t) for n, d, t in zip(names, self.draws, taken, strict=True)}
        fixed = {n: d.fixed_after(t) for n, d, t in zip(names, self.draws, taken, strict=True)}
        began = {name: lap for name, lap in fixed.items() if lap is not None}
        return Start(k, self.consumed(k), position, {**before.fixed, **began})


@dataclass(frozen=True)
class Mixture:
    """A solved mixture; `megacpt.data.solve.solve` makes it.

    Attributes:
        segments: at least one, in order.
        steps: iterations of the run, from its sample 0.
        steps_available: iterations that the mixture holds; more than `steps` where the budget stops early.
    """

    segments: tuple[Segment, ...]
    seq_length: int
    global_batch_size: int
    seed: int
    course: Course
    steps: int
    steps_available: int

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources, in the order of their numbers; their weights are the first segment's."""
        return self.segments[0].sources

    @property
    def start(self) -> Start:
        """Where the mixture takes over."""
        return self.segments[0].start

    @property
    def samples(self) -> int:
        """Samples from `start.sample` on, before the last batch is filled."""
        return sum(segment.samples for segment in self.segments)

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples of each source within `samples`."""
        return tuple(map(sum, zip(*(segment.counts for segment in self.segments), strict=True)))

    @property
    def ends(self) -> bool:
        """Whether the mixture has an end of its own."""
        return self.segments[-1].ends

    @property
    def stop(self) -> int:
        """The run ends with the batch that reaches this global sample."""
        return min(self.start.sample + self.samples, self.steps * self.global_batch_size)

    def segment(self, k: int) -> Segment:
        """The segment that holds global sample k.

        Raises:
            IndexError: the sample belongs to an earlier mixture.
        """
        if k < self.start.sample:
            raise IndexError(f"sample {k} comes before the mixture, which begins at {self.start.sample}")
        return self.segments[bisect_right(self.segments, k, key=lambda segment: segment.start.sample) - 1]

    def locate(self, k: int) -> tuple[int, int, int]:
        """Global sample k as (source, number of a shuffled pass over it, sample in that pass).

        Raises:
            IndexError: the sample belongs to an earlier mixture.
        """
        return self.segment(k).locate(k)

    def at(self, k: int) -> Start:
        """Where another mixture takes over at global sample k."""
        return self._before(k).at(k)

    def consumed(self, k: int) -> dict[str, int]:
        """Samples of each source among the run's first k, those before this mixture and of former sources included.

        Raises:
            IndexError: k lies in an earlier mixture.
        """
        return self._before(k).consumed(k)

    def _before(self, k: int) -> Segment:
        """The segment that ends with, or goes on beyond, global sample k - 1."""
        return self.segment(max(k - 1, self.start.sample) if k >= self.start.sample else k)

    def epochs(self, k: int) -> dict[str, Fraction]:
        """Passes over each source's corpus that the run's first k samples make."""
        consumed = self.consumed(k)
        return {s.name: Fraction(consumed[s.name], samples_per_pass(s.tokens, self.seq_length)) for s in self.sources}

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the sequence of samples, ready for JSON; the budget and the batch size do not."""
        passes = self.course.passes
        return {
            "algorithm": ALGORITHM,
            "seq_length": self.seq_length,
            "seed": self.seed,
            "pass_samples": None if passes is None else passes.samples,
            "sources": {s.name: {k: v for k, v in asdict(s).items() if k != "name"} for s in self.sources},
            "shifts": [{"sample": s.sample, "weights": dict(s.weights)} for s in self.course.shifts],
            "start": {
                "sample": self.start.sample,
                "consumed": dict(self.start.consumed),
                "position": None if self.start.position is None else dict(self.start.position),
                "fixed": dict(self.start.fixed),
            },
        }
