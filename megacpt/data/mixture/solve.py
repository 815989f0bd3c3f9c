"""Solve a mixture into exact sample counts: what the configuration asks for, checked and turned into integers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from math import isfinite

from megacpt.data.keyed import seeded_key
from megacpt.data.mixture.draw import Draw
from megacpt.data.mixture.interleave import Interleaving
from megacpt.data.mixture.mixture import Budget, Course, Mixture, Passes, Segment, Source, Start
from megacpt.data.mixture.order import samples_per_pass
from megacpt.errors import UserError

RESOLUTION = 1 << 30
"""Weights without epochs become integer shares of this many items, whatever the budget."""


def solve(
    sources: Sequence[Source],
    seq_length: int,
    global_batch_size: int,
    seed: int,
    budget: Budget | None = None,
    start: Start | None = None,
    course: Course | None = None,
) -> Mixture:
    """The mixture of `sources`, whose order means nothing but in the table and as their numbers.

    Args:
        budget: an early stop where the mixture has epochs or passes, required where it has neither.
        start: where the mixture takes over in a run that began with another one.
        course: passes of the mixture, and weights that change within the run.

    Raises:
        UserError: the sources contradict each other, or the budget or the course them.
    """
    start, course = start or Start(), course or Course()
    for source in sources:
        _check(source, seq_length, course)
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise UserError("data.sources: declare at least one source, and each name once")
    steps = (budget or Budget()).steps(seq_length, global_batch_size)
    end = _end(sources, seq_length, start, course.passes)
    ends = end is not None
    if end is None:
        if steps is None:
            raise UserError(
                "train: weights alone do not say how long to train; set one of train_iters, train_samples, "
                "train_tokens, or give a source epochs instead of a weight"
            )
        end = max(start.sample, steps * global_batch_size)
    available = -(-end // global_batch_size)
    steps = available if steps is None else steps
    if steps > available:
        raise UserError(
            f"train: the budget is {steps:,} iterations, but the mixture holds {available:,} of "
            f"{global_batch_size:,} samples; leave it null to train on all of it, or ask for more epochs or passes"
        )
    if steps * global_batch_size <= start.sample:
        raise UserError(
            f"train: the budget is {steps * global_batch_size:,} samples, but {start.sample:,} are consumed already; "
            "raise it"
        )
    return Mixture(
        segments=_segments(sources, seq_length, seed, start, (course, end, ends)),
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        seed=seed,
        course=course,
        steps=steps,
        steps_available=available,
    )


def apportion(total: int, weights: Sequence[Fraction]) -> list[int]:
    """Integers proportional to `weights` that sum to `total` exactly, by largest remainder."""
    whole = sum(weights)
    quotas = [total * weight / whole for weight in weights] if whole else [Fraction(0)] * len(weights)
    parts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - quotas[i])
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


def _end(sources: Sequence[Source], seq_length: int, start: Start, passes: Passes | None) -> int | None:
    """The global sample with which the mixture ends by itself; None: it does not."""
    if passes is not None:
        if passes.samples < 1 or passes.number < 1:
            raise UserError(
                "data.mixture: a pass is empty; pass_tokens is less than one sample of seq_length tokens, or passes is "
                "below 1: raise them"
            )
        return start.sample + passes.samples * passes.number
    if any(source.epochs is not None for source in sources):
        return start.sample + sum(_epoch_counts(sources, seq_length, start))
    return None


def _segments(
    sources: Sequence[Source], seq_length: int, seed: int, start: Start, extent: tuple[Course, int, bool]
) -> tuple[Segment, ...]:
    """The segments from `start` to the end: one, and one more for each shift on the way."""
    course, end, ends = extent
    begins = [start.sample, *(shift.sample for shift in course.shifts if start.sample < shift.sample < end)]
    past = [shift for shift in course.shifts if shift.sample <= start.sample]
    current = _shifted(sources, past[-1].weights if past else None)
    coming = {shift.sample: shift.weights for shift in course.shifts}
    segments: list[Segment] = []
    for begin, stop in zip(begins, [*begins[1:], end], strict=True):
        if segments:
            current, start = _shifted(current, coming[begin]), segments[-1].at(begin)
        segments.append(_segment(current, seq_length, seed, start, (course.passes, stop, ends and stop == end)))
    return tuple(segments)


def _shifted(sources: Sequence[Source], weights: Mapping[str, float] | None) -> tuple[Source, ...]:
    """The sources, with other weights if there are any; who is left out has none."""
    return tuple(s if weights is None else replace(s, weight=weights.get(s.name, 0.0)) for s in sources)


def _segment(
    sources: tuple[Source, ...], seq_length: int, seed: int, start: Start, extent: tuple[Passes | None, int, bool]
) -> Segment:
    passes, stop, ends = extent
    if passes is not None:
        shares = apportion(passes.samples, _weights(sources))
        _check_passes(sources, shares, seq_length)
    elif any(source.epochs is not None for source in sources):
        shares = _epoch_counts(sources, seq_length, start)
    else:
        shares = apportion(RESOLUTION, _weights(sources))
    interleaving = Interleaving([source.name for source in sources], shares, seed)
    draws = tuple(
        _draw(source, seq_length, start, seed, None if passes is None else share)
        for source, share in zip(sources, shares, strict=True)
    )
    samples = max(0, stop - start.sample)
    return Segment(sources, start, interleaving, draws, tuple(interleaving.counts(samples)), samples, ends)


def _draw(source: Source, seq_length: int, start: Start, seed: int, per_pass: int | None) -> Draw:
    position = start.position_of(source.name)
    if per_pass is None or source.redraw == "continue":
        return Draw(samples_per_pass(source.tokens, seq_length), position)
    key = seeded_key("once", seed, source.name, start.sample)
    size, fixed = full_samples(source.tokens, seq_length), start.fixed.get(source.name)
    return Draw(size, position, max(1, per_pass), source.redraw, key, fixed)


def full_samples(tokens: int, seq_length: int) -> int:
    """Samples of a pass over `tokens` tokens in which every target counts, at least 1."""
    return max(1, (tokens - 1) // seq_length)


def _check(source: Source, seq_length: int, course: Course) -> None:
    """Refuse a source that says nothing, both, or nonsense, and a corpus without a single target."""
    where, epochs, weight = f"data.sources.{source.name}", source.epochs, source.weight
    if (epochs is None) == (weight is None):
        state = "neither epochs nor weight is" if epochs is None else "both epochs and weight are"
        raise UserError(f"{where}: {state} set; give epochs (exact passes) or weight (a share of the samples)")
    if epochs is not None and (isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1):
        raise UserError(f"{where}: epochs {epochs} is not a whole number of passes, at least 1")
    if weight is not None and (isinstance(weight, bool) or not isfinite(weight) or weight < 0):
        raise UserError(f"{where}: weight {weight} is not a share; give a number that is not negative")
    if epochs is not None and (course.passes is not None or course.shifts):
        what = "passes of a mixture" if course.passes is not None else "weights that change within a run"
        raise UserError(f"{where}: epochs do not go with {what}; give the source a weight")
    if not samples_per_pass(source.tokens, seq_length):
        raise UserError(
            f"{where}: the corpus has {source.documents:,} documents with {source.tokens:,} tokens, too few for one "
            "sample; check its path or remove the source"
        )


def _check_passes(sources: Sequence[Source], shares: Sequence[int], seq_length: int) -> None:
    """Refuse a pass that takes more of a source than it has, unless the source may repeat."""
    for source, share in zip(sources, shares, strict=True):
        if source.repeat or source.redraw == "continue":
            continue
        asked, found = share * seq_length, (source.tokens - 1) // seq_length * seq_length
        if asked > found:
            raise UserError(
                f"data.sources.{source.name}: a pass of the mixture takes {asked:,} tokens of it, but it has "
                f"{found:,} in whole samples, {asked - found:,} too few; lower data.mixture.pass_tokens or its share, "
                f"or let it repeat within a pass with data.sources.{source.name}.repeat=true"
            )


def _weights(sources: Sequence[Source]) -> list[Fraction]:
    """Weights as the decimal numbers that the user wrote; 0 for sources with epochs, which have none."""
    weights = [Fraction(str(source.weight or 0)) for source in sources]
    if not any(weights) and all(source.epochs is None for source in sources):
        raise UserError("data.sources: every weight is 0; give at least one source a positive weight or epochs")
    return weights


def _epoch_counts(sources: Sequence[Source], seq_length: int, start: Start) -> list[int]:
    """Samples of each source where some have epochs: N = (samples of the epochs) / (1 - sum of weights)."""
    weights = _weights(sources)
    whole = sum(weights)
    if whole >= 1:
        raise UserError(
            f"data.sources: weights sum to {float(whole):g}, which leaves nothing for the sources with epochs; beside "
            "epochs a weight is a share of all samples, so lower them to a sum below 1"
        )
    counts = [0] * len(sources)
    for i, source in enumerate(sources):
        if source.epochs is None:
            continue
        asked, before = source.epochs * samples_per_pass(source.tokens, seq_length), start.position_of(source.name)
        if asked < before:
            raise UserError(
                f"data.sources.{source.name}: {source.epochs:,} epochs are {asked:,} samples, but {before:,} are "
                "consumed already; ask for more epochs, or give it a weight"
            )
        counts[i] = asked - before
    if not any(counts):
        raise UserError("data.sources: every epoch that the sources ask for is consumed already; ask for more epochs")
    rest = int(sum(counts) * whole / (1 - whole) + Fraction(1, 2))
    return [count + part for count, part in zip(counts, apportion(rest, weights), strict=True)]
