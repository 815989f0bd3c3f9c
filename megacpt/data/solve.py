"""Solve a mixture into exact sample counts: what the configuration asks for, checked and turned into integers."""

from collections.abc import Sequence
from fractions import Fraction
from math import isfinite

from megacpt.data.interleave import Interleaving
from megacpt.data.mixture import Budget, Mixture, Source, Start
from megacpt.data.order import samples_per_pass
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
) -> Mixture:
    """The mixture of `sources`, whose order means nothing but in the table and as their numbers.

    Args:
        budget: an early stop where a source has epochs, required where none has.
        start: where the mixture takes over in a run that began with another one.

    Raises:
        UserError: the sources contradict each other, or the budget them.
    """
    start = start or Start()
    for source in sources:
        _check(source, seq_length)
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise UserError("data.sources: declare at least one source, and each name once")
    ends = any(source.epochs is not None for source in sources)
    shares = _epoch_counts(sources, seq_length, start) if ends else apportion(RESOLUTION, _weights(sources))
    interleaving = Interleaving(names, shares, seed)
    steps = (budget or Budget()).steps(seq_length, global_batch_size)
    if ends:
        available = -(-(start.sample + sum(shares)) // global_batch_size)
        samples, steps = sum(shares), available if steps is None else steps
        if steps > available:
            raise UserError(
                f"train: the budget is {steps:,} iterations, but the mixture holds {available:,} of "
                f"{global_batch_size:,} samples; leave it null to train on all of it, or ask for more epochs"
            )
    else:
        if steps is None:
            raise UserError(
                "train: weights alone do not say how long to train; set one of train_iters, train_samples, "
                "train_tokens, or give a source epochs instead of a weight"
            )
        available, samples = steps, steps * global_batch_size - start.sample
    if steps * global_batch_size <= start.sample:
        raise UserError(
            f"train: the budget is {steps * global_batch_size:,} samples, but {start.sample:,} are consumed already; "
            "raise it"
        )
    return Mixture(
        sources=tuple(sources),
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        seed=seed,
        start=start,
        interleaving=interleaving,
        counts=tuple(interleaving.counts(samples)),
        samples=samples,
        steps=steps,
        steps_available=available,
        ends=ends,
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


def _check(source: Source, seq_length: int) -> None:
    """Refuse a source that says nothing, both, or nonsense, and a corpus without a single target."""
    where, epochs, weight = f"data.sources.{source.name}", source.epochs, source.weight
    if (epochs is None) == (weight is None):
        state = "neither epochs nor weight is" if epochs is None else "both epochs and weight are"
        raise UserError(f"{where}: {state} set; give epochs (exact passes) or weight (a share of the samples)")
    if epochs is not None and (isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1):
        raise UserError(f"{where}: epochs {epochs} is not a whole number of passes, at least 1")
    if weight is not None and (isinstance(weight, bool) or not isfinite(weight) or weight < 0):
        raise UserError(f"{where}: weight {weight} is not a share; give a number that is not negative")
    if not samples_per_pass(source.tokens, seq_length):
        raise UserError(
            f"{where}: the corpus has {source.documents:,} documents with {source.tokens:,} tokens, too few for one "
            "sample; check its path or remove the source"
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
        asked, before = source.epochs * samples_per_pass(source.tokens, seq_length), start.consumed.get(source.name, 0)
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
