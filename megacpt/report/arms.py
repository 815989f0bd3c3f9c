"""Arms: runs that differ only in their seed, and what their spread lets one say."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megacpt.errors import UserError
from megacpt.eval.seeds import Difference, difference, mean_interval
from megacpt.eval.stability import Curve, Gap, Point, make_curve
from megacpt.report.run import Change, Metric, RunData

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Arm:
    """One or more runs under one name and in one colour."""

    name: str
    runs: tuple[RunData, ...]
    colour: int

    @property
    def single(self) -> bool:
        """Whether it is just one run."""
        return len(self.runs) == 1

    @property
    def ended(self) -> bool:
        """Whether all its runs are over."""
        return all(run.ended for run in self.runs)

    def metrics(self, key: Key) -> list[Metric]:
        """That metric of every run that has it."""
        return [metric for run in self.runs if (metric := run.metric(key)) is not None]

    def by_seed(self, read: Callable[[RunData], float | None]) -> dict[int, float]:
        """Seed -> a number of each run that has one."""
        return {seed: value for seed, run in self.seeded().items() if (value := read(run)) is not None}

    def seeded(self) -> dict[int, RunData]:
        """Seed -> run; where seeds are unknown or repeated, numbers that no other arm has."""
        seeds = [run.provenance.seed for run in self.runs]
        if None in seeds or len(set(seeds)) < len(seeds):
            seeds = [-1 - 1000 * self.colour - number for number in range(len(seeds))]
        return {seed: run for seed, run in zip(seeds, self.runs, strict=True) if seed is not None}


def make_arms(runs: Sequence[RunData], groups: Mapping[str, Sequence[RunData]]) -> list[Arm]:
    """The groups, then each run that is in none, in distinct colours.

    Raises:
        UserError: two arms have one name.
    """
    grouped = {id(run) for members in groups.values() for run in members}
    named = [(name, tuple(members)) for name, members in groups.items()]
    named += [(run.name, (run,)) for run in runs if id(run) not in grouped]
    names = [name for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} names two things in the report; rename the group or the run (NAME=RUN)")
    return [Arm(name, members, colour) for colour, (name, members) in enumerate(named)]


def keys_of(arms: Sequence[Arm]) -> list[Key]:
    """Every metric of every run, in the order in which they first come."""
    return list(dict.fromkeys(metric.key for arm in arms for run in arm.runs for metric in run.metrics))


def mean_metric(metrics: Sequence[Metric]) -> Metric:
    """The mean over runs at the iterations that all have; one run is returned as it is.

    Its interval is the t interval of the mean change since each run's own step 0, so that what seeds differ in before
    training (the samples of an evaluation set) is no part of it, and `paired` has that change. Without a
    common step 0 it is the t interval of the values.
    """
    if len(metrics) == 1:
        return metrics[0]
    curves = [metric.curve for metric in metrics]
    common = sorted(set.intersection(*(set(curve.iteration.tolist()) for curve in curves)))
    points, paired = [], {}
    for iteration in common:
        values = [_value(curve, iteration) for curve in curves]
        tokens = float(np.mean([curve.tokens[np.searchsorted(curve.iteration, iteration)] for curve in curves]))
        starts = [float(curve.value[0]) if common[0] == 0 else 0.0 for curve in curves]
        change, low, high = mean_interval([value - start for value, start in zip(values, starts, strict=True)])
        level = float(np.mean(starts))
        assert low is not None
        assert high is not None
        points.append(Point(iteration, tokens, level + change, level + low, level + high))
        if iteration and common[0] == 0:
            paired[iteration] = Change(change, low, high)
    first = metrics[0]
    curve = make_curve(points, higher_is_better=first.curve.higher_is_better)
    return Metric(first.kind, first.name, first.measure, first.suite, curve, paired, len(metrics))


def _value(curve: Curve, iteration: int) -> float:
    return float(curve.value[np.searchsorted(curve.iteration, iteration)])


@dataclass(frozen=True)
class Comparison:
    """A number of two arms: its means, how many runs have none, and the difference where both arms have any."""

    what: str
    a: float | None
    b: float | None
    missing: tuple[int, int]
    difference: Difference | None


NUMBERS: tuple[tuple[str, Callable[[Gap], float | None]], ...] = (
    ("final", lambda gap: gap.final.value),
    ("best", lambda gap: gap.best.value),
    ("dip depth", lambda gap: gap.depth),
    ("dip area", lambda gap: gap.area),
    ("tokens to recovery", lambda gap: gap.tokens_to_recovery),
)


def compare(a: Arm, b: Arm, key: Key) -> list[Comparison]:
    """The gap's numbers of one metric, arm a beside arm b."""
    return [_compared(what, a, b, key, read) for what, read in NUMBERS]


def _compared(what: str, a: Arm, b: Arm, key: Key, read: Callable[[Gap], float | None]) -> Comparison:
    def number(run: RunData) -> float | None:
        metric = run.metric(key)
        numbers = metric.gap if metric is not None else None
        return None if numbers is None else read(numbers)

    first, second = a.by_seed(number), b.by_seed(number)

    def mean(values: dict[int, float]) -> float | None:
        return float(np.mean(list(values.values()))) if values else None

    missing = len(a.runs) - len(first), len(b.runs) - len(second)
    # A mean over those runs alone that did recover would flatter the arm in which few do.
    told = difference(first, second) if first and second and not any(missing) else None
    return Comparison(what, mean(first), mean(second), missing, told)


def difference_curve(a: Arm, b: Arm, key: Key) -> tuple[list[Point], str]:
    """Arm a minus arm b at the iterations that all their runs have, with its 95 % interval; and by which method."""
    members = [
        {seed: metric.curve for seed, run in arm.seeded().items() if (metric := run.metric(key)) is not None}
        for arm in (a, b)
    ]
    curves = [*members[0].values(), *members[1].values()]
    if not (members[0] and members[1]):
        return [], ""
    points, method = [], ""
    for iteration in sorted(set.intersection(*(set(curve.iteration.tolist()) for curve in curves))):
        values = [{seed: _value(curve, iteration) for seed, curve in arm.items()} for arm in members]
        told = difference(values[0], values[1])
        tokens = float(np.mean([curve.tokens[np.searchsorted(curve.iteration, iteration)] for curve in curves]))
        points.append(Point(iteration, tokens, told.mean, told.low, told.high))
        method = told.method
    return points, method
