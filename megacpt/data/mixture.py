"""A solved mixture: how many samples of each source there are, and which sample is the k-th of the run.

With `epochs` anywhere, the mixture has an end: sources with epochs give exactly that many passes, and sources with a
weight fill their share of the total, N = (samples of the epochs) / (1 - sum of weights); samples from N on, which only
complete the last global batch, are the largest source's. With weights alone there is no end: the shares do not depend
on the budget, so a longer run begins as the shorter one did.

The k-th sample depends on the sources, seq_length, the seed and k; not on the batch size, the budget or who asks.
Nothing here reads a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from megacpt.data.interleave import Interleaving
from megacpt.data.order import samples_per_pass
from megacpt.data.table import aligned
from megacpt.errors import UserError

HEADER = ("source", "documents", "tokens", "samples/pass", "samples", "share", "epochs")
ALGORITHM = 1
"""Raised whenever the same configuration would give another sequence of samples."""


@dataclass(frozen=True)
class Source:
    """A corpus and what the configuration asks of it: `epochs` (exact passes) or `weight` (a share of the samples).

    Attributes:
        documents, tokens: its size.
        digest: identifies its content wherever it lies; compared when a run resumes.
    """

    name: str
    documents: int
    tokens: int
    digest: str = ""
    epochs: int | None = None
    weight: float | None = None


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
class Start:
    """Where a mixture takes over from another one: at global sample `sample`, each source continuing after `consumed`.

    `consumed` also remembers sources that the mixture no longer has, so that they can come back.
    """

    sample: int = 0
    consumed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Mixture:
    """A solved mixture; `megacpt.data.solve.solve` makes it.

    Attributes:
        counts: samples of each source within `samples`, in the order of `sources`.
        samples: samples of this mixture, from `start.sample` on, before the last batch is filled.
        steps: iterations of the run, from its sample 0.
        steps_available: iterations that the mixture holds; more than `steps` where the budget stops early.
        ends: whether some source has epochs, so that the mixture has an end.
    """

    sources: tuple[Source, ...]
    seq_length: int
    global_batch_size: int
    seed: int
    start: Start
    interleaving: Interleaving
    counts: tuple[int, ...]
    samples: int
    steps: int
    steps_available: int
    ends: bool

    @property
    def largest(self) -> int:
        """The source with most samples, which fills the last global batch; of equals the first by name."""
        return min(range(len(self.sources)), key=lambda i: (-self.counts[i], self.sources[i].name))

    @property
    def stop(self) -> int:
        """The run ends with the batch that reaches this global sample."""
        return min(self.start.sample + self.samples, self.steps * self.global_batch_size)

    def offset(self, source: int) -> int:
        """Samples of a source that were consumed before this mixture began."""
        return self.start.consumed.get(self.sources[source].name, 0)

    def locate(self, k: int) -> tuple[int, int]:
        """Global sample k as (source, sample of that source's own endless sequence of passes).

        Raises:
            IndexError: the sample belongs to an earlier mixture.
        """
        item = self._item(k)
        if self.ends and item >= self.samples:
            source, index = self.largest, self.counts[self.largest] + item - self.samples
        else:
            source, index = self.interleaving.locate(item)
        return source, self.offset(source) + index

    def locate_many(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`locate` for int64 [n], as two int64 [n]."""
        item = k - self.start.sample
        self._item(int(k.min(initial=self.start.sample)))
        source, index = self.interleaving.locate_many(item)
        if self.ends:
            beyond = item >= self.samples
            source[beyond] = self.largest
            index[beyond] = self.counts[self.largest] + item[beyond] - self.samples
        return source, index + np.array([self.offset(i) for i in range(len(self.sources))])[source]

    def consumed(self, k: int) -> dict[str, int]:
        """Samples of each source among the run's first k, those before this mixture and of former sources included.

        Raises:
            IndexError: k lies in an earlier mixture.
        """
        item = self._item(k)
        inside = min(item, self.samples) if self.ends else item
        counts = self.interleaving.counts(inside)
        counts[self.largest] += item - inside
        now = {source.name: self.offset(i) + counts[i] for i, source in enumerate(self.sources)}
        return {**self.start.consumed, **now}

    def epochs(self, k: int) -> dict[str, Fraction]:
        """Passes over each source's corpus that the run's first k samples make."""
        consumed = self.consumed(k)
        return {s.name: Fraction(consumed[s.name], samples_per_pass(s.tokens, self.seq_length)) for s in self.sources}

    def _item(self, k: int) -> int:
        if k < self.start.sample:
            raise IndexError(f"sample {k} comes before the mixture, which begins at {self.start.sample}")
        return k - self.start.sample

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the sequence of samples, ready for JSON; the budget and the batch size do not."""
        return {
            "algorithm": ALGORITHM,
            "seq_length": self.seq_length,
            "seed": self.seed,
            "sources": {
                source.name: {
                    "documents": source.documents,
                    "tokens": source.tokens,
                    "digest": source.digest,
                    "epochs": source.epochs,
                    "weight": source.weight,
                }
                for source in self.sources
            },
            "start": {"sample": self.start.sample, "consumed": dict(self.start.consumed)},
        }

    def table(self) -> str:
        """The mixture for a terminal: a line per source, the total, then the steps and what fills the last batch."""
        rows = []
        for i, source in enumerate(self.sources):
            size = samples_per_pass(source.tokens, self.seq_length)
            share, epochs = self.counts[i] / max(1, self.samples), Fraction(self.offset(i) + self.counts[i], size)
            numbers = (source.documents, source.tokens, size, self.counts[i])
            rows.append([source.name, *(f"{n:,}" for n in numbers), f"{share:.2%}", _passes(epochs)])
        documents, tokens = (sum(getattr(source, key) for source in self.sources) for key in ("documents", "tokens"))
        total = ["total", f"{documents:,}", f"{tokens:,}", "", f"{self.samples:,}", f"{1:.2%}", ""]
        return "\n".join([*aligned(HEADER, rows, total), *self._notes()])

    def _notes(self) -> list[str]:
        """The lines under the table."""
        batch, end = self.global_batch_size, self.start.sample + self.samples
        notes = []
        if self.start.sample:
            before = ", ".join(f"{name} {count:,}" for name, count in self.start.consumed.items())
            notes.append(f"begins at sample {self.start.sample:,} of the run, after {before}; epochs include these")
        notes.append(f"steps: {self.steps_available:,} of {batch:,} samples x {self.seq_length:,} tokens")
        if self.steps < self.steps_available:
            reached = ", ".join(f"{name} {_passes(passes)}" for name, passes in self.epochs(self.stop).items())
            notes.append(f"stops early after step {self.steps:,}, at epochs: {reached}")
        fill = self.steps * batch - end
        if fill > 0:
            name = self.sources[self.largest].name
            notes.append(f"last batch: filled with {fill:,} samples of the next pass over {name}")
        else:
            notes.append("last batch: full")
        unused = [source.name for i, source in enumerate(self.sources) if not self.counts[i]]
        if unused:
            notes.append(f"no sample of: {', '.join(unused)}")
        return notes


def _passes(passes: Fraction) -> str:
    """Passes over a corpus: `2` where exact, else `0.53`."""
    if passes.denominator == 1:
        return f"{passes.numerator:,}"
    return f"{float(passes):,.2f}" if passes >= Fraction(1, 100) else "<0.01"
