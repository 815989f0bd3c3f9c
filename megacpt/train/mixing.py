"""From section `data` to the corpora it names and the mixture solved over them, new or taken over on resume."""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

from megacpt.config.tree import Config, Data, Phase
from megacpt.config.tree import Source as SourceSection
from megacpt.data.mixture.continuation import continuation, differences, start_of
from megacpt.data.mixture.mixture import Budget, Course, Mixture, Passes, Shift, Source, Start
from megacpt.data.mixture.recipe import Recipe, named_blend, shares
from megacpt.data.mixture.solve import solve
from megacpt.data.samples.blended import Corpus, for_all
from megacpt.errors import UserError
from megacpt.train.plan import Resume
from megacpt.train.schedule import LRSchedule


def named_sources(data: Data) -> dict[str, SourceSection]:
    """The sources of `data.sources` or `data.data_path`, checked against the rest of the section.

    Raises:
        UserError: none or both are set, or keys contradict one another.
    """
    if data.data_path is not None and data.sources:
        raise UserError("data.sources and data.data_path are both set; keep one of them")
    if data.data_path is not None:
        parts = data.data_path.split() if isinstance(data.data_path, str) else data.data_path
        named = {n: SourceSection(path=path, weight=weight) for n, (weight, path) in named_blend(parts).items()}
    else:
        named = dict(data.sources)
    if not named:
        raise UserError("data.sources: declare at least one source: NAME: {path: PREFIX, epochs: N}")
    mixture = data.mixture
    if (mixture.passes is None) != (mixture.pass_tokens is None):
        raise UserError("data.mixture: passes and pass_tokens go together; set both or neither")
    for name, source in named.items():
        if source.tokens is not None and source.subset is None:
            raise UserError(f"data.sources.{name}.tokens takes the best of a subset; set subset, or unset tokens")
        if mixture.passes is not None and source.epochs is not None:
            raise UserError(f"data.sources.{name}.epochs do not go with passes of a mixture; unset them or passes")
        if mixture.passes is None and (source.redraw is not None or source.repeat):
            key = "repeat" if source.repeat else "redraw"
            raise UserError(f"data.sources.{name}.{key} is about passes of the mixture; set data.mixture.passes")
    for number, phase in enumerate(data.phases):
        _check_phase(f"data.phases[{number}]", phase, named)
    return named


def _check_phase(where: str, phase: Phase, named: Mapping[str, SourceSection]) -> None:
    if (phase.after_tokens is None) == (phase.when_lr_below is None):
        raise UserError(f"{where}: set after_tokens or when_lr_below, one of them: it says where the phase begins")
    if (phase.weights is None) == (phase.replay is None):
        raise UserError(f"{where}: set weights or replay, one of them: it says what changes")
    unknown = [name for name in phase.weights or () if name not in named]
    if unknown:
        raise UserError(f"{where}.weights: there is no source '{unknown[0]}'; data.sources has {', '.join(named)}")
    if phase.weights is not None and not any(phase.weights.values()):
        raise UserError(f"{where}.weights: every weight is 0; give at least one source a positive weight")


def open_corpora(named: Mapping[str, SourceSection]) -> dict[str, Corpus]:
    """Every source's documents, by name, in the order of `named`.

    Raises:
        UserError: a file is missing, truncated or foreign, or a subset is another corpus's.
    """
    opened = for_all(lambda source: Corpus.open(source.path, source.subset, source.tokens), named.values())
    return dict(zip(named, opened, strict=True))


def solve_mixture(
    config: Config, corpora: Mapping[str, Corpus], schedule: LRSchedule, resume: Resume | None = None
) -> tuple[Mixture, tuple[str, ...]]:
    """The solved mixture, and what to tell of it; on resume it is the checkpoint's or takes over from it.

    Raises:
        UserError: the section contradicts itself or the corpora, or the mixture changed unasked.
    """
    if resume is None:
        return _solve(config, corpora, schedule, Start())
    state = resume.state
    mixture, notes = _solve(config, corpora, schedule, start_of(state.mixture))
    new = mixture.fingerprint()
    changes = differences(state.mixture, new)
    if not changes:
        return mixture, notes
    if not config.data.accept_change:
        raise UserError(
            f"the mixture is not the one of {resume.folder}: {'; '.join(changes)}; restore it, or set "
            "data.accept_change=true to go on from what each source has consumed"
        )
    at = Start(state.consumed_samples, state.samples_by_source, state.position_by_source or None, state.fixed_by_source)
    mixture, notes = _solve(config, corpora, schedule, continuation(state.mixture, new, at))
    return mixture, (*notes, f"mixture changed at sample {at.sample:,}: {'; '.join(changes)}")


def _solve(
    config: Config, corpora: Mapping[str, Corpus], schedule: LRSchedule, start: Start
) -> tuple[Mixture, tuple[str, ...]]:
    data, train = config.data, config.train
    named, size = named_sources(data), data.seq_length
    tokens = {name: corpus.tokens for name, corpus in corpora.items()}
    own = {name: source.weight for name, source in named.items()}
    recipe = Recipe(data.mixture.preset, tuple(data.mixture.replace), data.mixture.with_, data.mixture.replay)
    weights = shares(recipe, own, tokens)
    if recipe.domain is not None and named[recipe.domain].epochs is not None:
        # What the others leave is the domain's already, in as many passes as are asked for.
        weights[recipe.domain] = None
    sources = [
        Source(
            name,
            len(corpora[name]),
            corpora[name].tokens,
            corpora[name].digest,
            source.epochs,
            weights[name],
            source.redraw or "each_pass",
            source.repeat,
        )
        for name, source in named.items()
    ]
    passes = None
    if data.mixture.passes is not None and data.mixture.pass_tokens is not None:
        _check_sum("data.sources", weights)
        passes = Passes((2 * data.mixture.pass_tokens + size) // (2 * size), data.mixture.passes)
    budget = Budget(train.train_iters, train.train_samples, train.train_tokens)
    mixture = solve(sources, size, train.global_batch_size, train.seed, budget, start, Course(passes))
    if not data.phases:
        return mixture, ()
    shifts: list[Shift] = []
    notes: list[str] = []
    for number, phase in enumerate(data.phases):
        where = f"data.phases[{number}]"
        asked = sample = _begin(where, phase, mixture, schedule)
        if passes is not None and asked > start.sample:
            sample = start.sample + passes.samples * _passes_before(asked - start.sample, phase, passes, data, start)
            if sample > asked:
                notes.append(f"{where} waits for the end of a pass: sample {asked:,} -> {sample:,}")
        if shifts and sample <= shifts[-1].sample:
            raise UserError(f"{where} begins at sample {sample:,}, not after the phase before it; put them in order")
        if sample >= mixture.start.sample + mixture.samples:
            notes.append(f"{where} begins at sample {sample:,}, after the end of the mixture: it never does")
        if passes is not None and phase.weights is not None:
            _check_sum(f"{where}.weights", phase.weights)
        changed = phase.weights or shares(replace(recipe, replay=phase.replay), own, tokens)
        shifts.append(Shift(sample, {name: changed.get(name) or 0.0 for name in named}))
    course = Course(passes, tuple(shifts))
    return solve(sources, size, train.global_batch_size, train.seed, budget, start, course), tuple(notes)


def _passes_before(samples: int, phase: Phase, passes: Passes, data: Data, start: Start) -> int:
    """Whole passes of the mixture before a phase that is asked for after so many samples of it."""
    if phase.after_tokens is None or data.mixture.pass_tokens is None:
        return -(-samples // passes.samples)
    # Counted in the tokens that were asked for: a pass of whole samples has a few more or less than pass_tokens.
    return -(-(phase.after_tokens - start.sample * data.seq_length) // data.mixture.pass_tokens)


def _check_sum(where: str, weights: Mapping[str, float | None]) -> None:
    """Refuse shares of a pass that are not all of it."""
    whole = sum((Fraction(str(weight or 0)) for weight in weights.values()), Fraction(0))
    if abs(whole - 1) > Fraction(1, 10**6):
        parts = " + ".join(f"{name} {weight or 0:g}" for name, weight in weights.items())
        raise UserError(f"{where}: the shares of a pass sum to {float(whole):g} ({parts}); make them sum to 1")


def _begin(where: str, phase: Phase, mixture: Mixture, schedule: LRSchedule) -> int:
    """The global sample with which a phase begins."""
    batch, total = mixture.global_batch_size, mixture.steps_available
    if phase.after_tokens is not None:
        return -(-phase.after_tokens // mixture.seq_length)
    assert phase.when_lr_below is not None
    limit = Fraction(str(phase.when_lr_below)) * Fraction(schedule.lr)
    warm = schedule.warmup_steps(total, batch)
    step = next((s for s in range(total) if s >= warm and schedule.at(s, total, batch) < limit), None)
    if step is None:
        raise UserError(
            f"{where}: the learning rate does not fall below {phase.when_lr_below:g} of its peak in {total:,} "
            "iterations; raise when_lr_below or lower optimizer.min_lr"
        )
    return step * batch
