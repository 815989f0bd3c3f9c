"""The mixture as tables: what is planned, by arithmetic alone, and what the plan takes of every source's documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Protocol

import numpy as np

from megacpt.data.mixture.mixture import Mixture, Segment
from megacpt.data.mixture.order import PassOrder, samples_per_pass
from megacpt.data.mixture.table import aligned

HEADER = ("source", "documents", "tokens", "samples/pass", "samples", "share", "epochs")
PASS_HEADER = ("source", "documents", "tokens", "tokens/pass", "share", "redraw", "samples", "epochs")
LEDGER_HEADER = ("pass", "source", "documents", "tokens", "unique so far", "share", "epochs")


def table(mixture: Mixture) -> str:
    """The mixture for a terminal: a line per source, the total, then the steps and what fills the last batch."""
    lines = []
    for segment in mixture.segments:
        if len(mixture.segments) > 1:
            first, last = segment.start.sample, segment.start.sample + segment.samples
            lines.append(f"samples {first:,} to {last:,}, from token {first * mixture.seq_length:,} on:")
        lines += _passes_table(mixture, segment) if mixture.course.passes else _table(mixture, segment)
    return "\n".join([*lines, *_notes(mixture)])


def _table(mixture: Mixture, segment: Segment) -> list[str]:
    rows = []
    end = segment.at(segment.start.sample + segment.samples).consumed
    for source, count in zip(segment.sources, segment.counts, strict=True):
        size = samples_per_pass(source.tokens, mixture.seq_length)
        share, epochs = count / max(1, segment.samples), Fraction(end[source.name], size)
        numbers = (source.documents, source.tokens, size, count)
        rows.append([source.name, *(f"{n:,}" for n in numbers), f"{share:.2%}", _passes(epochs)])
    total = ["total", *_sizes(segment), "", f"{segment.samples:,}", f"{1:.2%}", ""]
    return aligned(HEADER, rows, total)


def _passes_table(mixture: Mixture, segment: Segment) -> list[str]:
    assert mixture.course.passes is not None
    rows, whole = [], mixture.course.passes.samples
    end = segment.at(segment.start.sample + segment.samples).consumed
    parts = segment.interleaving.counts(whole)
    for source, part, count in zip(segment.sources, parts, segment.counts, strict=True):
        epochs = Fraction(end[source.name], samples_per_pass(source.tokens, mixture.seq_length))
        numbers = [f"{n:,}" for n in (source.documents, source.tokens, part * mixture.seq_length)]
        rows.append([source.name, *numbers, f"{part / whole:.2%}", source.redraw, f"{count:,}", _passes(epochs)])
    size = f"{whole * mixture.seq_length:,}"
    return aligned(PASS_HEADER, rows, ["total", *_sizes(segment), size, f"{1:.2%}", "", f"{segment.samples:,}", ""])


def _sizes(segment: Segment) -> list[str]:
    return [f"{sum(getattr(source, key) for source in segment.sources):,}" for key in ("documents", "tokens")]


def _notes(mixture: Mixture) -> list[str]:
    """The lines under the table."""
    batch, start, passes = mixture.global_batch_size, mixture.start, mixture.course.passes
    end = start.sample + mixture.samples
    notes = []
    if start.sample:
        before = ", ".join(f"{name} {count:,}" for name, count in start.consumed.items())
        notes.append(f"begins at sample {start.sample:,} of the run, after {before}; epochs include these")
    if passes is not None:
        notes.append(f"passes: {passes.number:,} of {passes.samples:,} samples")
    notes.append(f"steps: {mixture.steps_available:,} of {batch:,} samples x {mixture.seq_length:,} tokens")
    if mixture.steps < mixture.steps_available:
        reached = ", ".join(f"{name} {_passes(epochs)}" for name, epochs in mixture.epochs(mixture.stop).items())
        notes.append(f"stops early after step {mixture.steps:,}, at epochs: {reached}")
    fill = mixture.steps * batch - end
    if fill > 0:
        last = mixture.segments[-1]
        name = last.sources[last.largest].name
        notes.append(f"last batch: filled with {fill:,} samples of the next pass over {name}")
    else:
        notes.append("last batch: full")
    unused = [source.name for source, count in zip(mixture.sources, mixture.counts, strict=True) if not count]
    if unused:
        notes.append(f"no sample of: {', '.join(unused)}")
    return notes


def _passes(passes: Fraction) -> str:
    """Passes over a corpus: `2` where exact, else `0.53`."""
    if passes.denominator == 1:
        return f"{passes.numerator:,}"
    return f"{float(passes):,.2f}" if passes >= Fraction(1, 100) else "<0.01"


class Stream(Protocol):
    """A source's documents, as `megacpt.data.samples.blended.SourceStream` reads them."""

    lengths: np.ndarray
    seq_length: int

    def order(self, number: int) -> PassOrder:
        """The shuffled pass `number` over the source."""


@dataclass(frozen=True)
class Entry:
    """What a stretch of the run takes of one source.

    Attributes:
        name: of the stretch: the number of the pass from 1, or "all".
        documents: different documents, in part or whole.
        tokens: targets trained on.
        unique: different tokens of the source that the run has read by the end of the stretch.
        epochs: `tokens` in passes over the source.
    """

    name: str
    source: str
    documents: int
    tokens: int
    unique: int
    share: float
    epochs: Fraction


def ledger(mixture: Mixture, streams: Sequence[Stream]) -> list[Entry]:
    """What every pass of the mixture (or the whole of it, where it has no passes) takes of every source, up to `stop`.

    Exact: the shuffles are worked out. Memory: 9 bytes a document of the largest source; time: a shuffle of each source
    for every pass.

    Args:
        streams: of the mixture's sources, in their order.
    """
    bounds, names = _stretches(mixture)
    entries: dict[int, list[Entry]] = {}
    for i, (source, stream) in enumerate(zip(mixture.sources, streams, strict=True)):
        read = np.zeros(len(stream.lengths), dtype=np.int32)
        for at, (begin, end) in enumerate(pairwise(bounds)):
            now = np.zeros(len(read), dtype=bool)
            tokens = 0
            for number, first, last in _runs(mixture, i, begin, end):
                tokens += _read(stream, (number, first, last), read, now)
            share, whole = Fraction(tokens, (end - begin) * mixture.seq_length), max(1, source.tokens - 1)
            unique, epochs = int(read.sum(dtype=np.int64)), Fraction(tokens, whole)
            entries.setdefault(at, []).append(
                Entry(names[at], source.name, int(now.sum()), tokens, unique, float(share), epochs)
            )
    return [entry for at in sorted(entries) for entry in entries[at]]


def _stretches(mixture: Mixture) -> tuple[list[int], list[str]]:
    """Global samples between which passes lie, and the passes' names."""
    first, stop, passes = mixture.start.sample, mixture.stop, mixture.course.passes
    if passes is None:
        return [first, stop], ["all"]
    bounds = [*range(first, stop, passes.samples), stop]
    return bounds, [str(number) for number in range(1, len(bounds))]


def _runs(mixture: Mixture, source: int, begin: int, end: int) -> list[tuple[int, int, int]]:
    """The samples of a source among global samples [begin, end), as (shuffled pass, first sample, end)."""
    runs: list[tuple[int, int, int]] = []
    while begin < end:
        segment = mixture.segment(begin)
        stop = min(end, segment.start.sample + segment.samples)
        lower, upper = (segment.taken(k)[source] for k in (begin, stop))
        runs += segment.draws[source].runs(lower, upper)
        begin = stop
    return runs


def _read(stream: Stream, run: tuple[int, int, int], read: np.ndarray, now: np.ndarray) -> int:
    """Mark the documents of a run of samples; `read` keeps how far into each document the run has come."""
    number, first, last = run
    size = stream.seq_length
    order = stream.order(number)
    start, stop = first * size, min(last * size + 1, int(order.bounds[-1]))
    for documents in order.whole(start, stop):
        held = documents[stream.lengths[documents] > 0]
        now[held] = True
        read[held] = stream.lengths[held]
    for document, _, end in order.edges(start, stop):
        now[document] = True
        read[document] = max(read[document], end)
    return stop - start - 1


def ledger_table(entries: Sequence[Entry]) -> str:
    """The ledger for a terminal: a line per pass and source."""
    rows = [
        [e.name, e.source, *(f"{n:,}" for n in (e.documents, e.tokens, e.unique)), f"{e.share:.2%}", _passes(e.epochs)]
        for e in entries
    ]
    total = ["total", "", "", f"{sum(e.tokens for e in entries):,}", "", "", ""]
    return "\n".join(aligned(LEDGER_HEADER, rows, total))
