from dataclasses import replace
from pathlib import Path

import pytest

from megacpt.errors import UserError
from megacpt.eval.seeds import mean_interval
from megacpt.report.arms import Arm, compare, difference_curve, make_arms, mean_metric
from megacpt.report.named import read_named, short_names
from megacpt.report.reading import read_run
from megacpt.report.run import RunData
from tests.report.runs import rows_of, write_run

KEY = ("set", "general", "accuracy")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunData]:
    """Two arms with seeds 1, 2, 3; the second falls deeper."""
    root = tmp_path_factory.mktemp("runs")
    found = {}
    for arm, depth in (("mixed", 0.06), ("plain", 0.13)):
        for seed in (1, 2, 3):
            name = f"{arm}-{seed}"
            noise = seed + (10 if arm == "plain" else 0)
            found[name] = read_run(write_run(root / name, rows_of(depth=depth, seed=noise), seed=seed), name)
    return found


def arms_of(runs: dict[str, RunData]) -> list[Arm]:
    groups = {arm: [run for name, run in runs.items() if name.startswith(arm)] for arm in ("mixed", "plain")}
    return make_arms(list(runs.values()), groups)


def test_seeds_are_paired(runs: dict[str, RunData]) -> None:
    mixed, plain = arms_of(runs)
    told = {number.what: number for number in compare(mixed, plain, KEY)}
    depth = told["dip depth"]
    assert depth.difference is not None
    assert depth.difference.method == "paired t"
    assert depth.a is not None
    assert depth.b is not None
    assert depth.difference.mean == pytest.approx(depth.a - depth.b)
    assert depth.missing == (0, 0)


def test_recovery_that_some_seeds_lack_has_no_difference(runs: dict[str, RunData]) -> None:
    mixed, plain = arms_of(runs)
    cut = [replace(run, metrics=[replace(m, curve=first(m.curve, 9)) for m in run.metrics]) for run in plain.runs]
    told = {n.what: n for n in compare(mixed, replace(plain, runs=tuple(cut)), KEY)}["tokens to recovery"]
    assert told.missing[1] == 3
    assert told.b is None
    assert told.difference is None


def first(curve, count):  # type: ignore[no-untyped-def]
    columns = ("iteration", "tokens", "value", "low", "high")
    return replace(curve, **{name: getattr(curve, name)[:count] for name in columns})


def test_runs_without_seeds_are_not_paired(runs: dict[str, RunData]) -> None:
    mixed, plain = arms_of(runs)
    seedless = [replace(run, provenance=replace(run.provenance, config={})) for run in plain.runs]
    told = compare(mixed, replace(plain, runs=tuple(seedless)), KEY)[0]
    assert told.difference is not None
    assert told.difference.method == "Welch t"


def test_the_mean_of_seeds_and_its_interval(runs: dict[str, RunData]) -> None:
    mixed, _ = arms_of(runs)
    metrics = mixed.metrics(KEY)
    mean = mean_metric(metrics)
    values = [metric.curve.value[5] for metric in metrics]
    assert mean.curve.value[5] == pytest.approx(sum(values) / 3)
    changes = [metric.curve.value[5] - metric.curve.value[0] for metric in metrics]
    _, low, _ = mean_interval(changes)
    assert low is not None
    assert mean.curve.low[5] - mean.curve.value[0] == pytest.approx(low)
    assert mean.curve.low[0] == mean.curve.value[0] == mean.curve.high[0]
    assert mean.paired.keys() == set(mean.curve.iteration.tolist()) - {0}
    assert mean.gap is not None
    assert mean.gap.basis == "paired"
    assert mean_metric(metrics[:1]) is metrics[0]


def test_the_difference_over_training(runs: dict[str, RunData]) -> None:
    mixed, plain = arms_of(runs)
    points, method = difference_curve(mixed, plain, KEY)
    assert method == "paired t"
    assert points[0].value == pytest.approx(0)
    assert max(point.value or 0.0 for point in points) > 0.04
    assert difference_curve(mixed, plain, ("task", "absent", "acc")) == ([], "")


def test_colours_and_names_of_arms_are_distinct(runs: dict[str, RunData]) -> None:
    arms = arms_of(runs)
    assert [arm.colour for arm in arms] == [0, 1]
    with pytest.raises(UserError, match="names two things"):
        make_arms(list(runs.values()), {"plain-1": [runs["mixed-1"], runs["mixed-2"]]})


def test_names_on_the_command_line(runs: dict[str, RunData]) -> None:
    one, two = (str(runs[name].folder) for name in ("mixed-1", "mixed-2"))
    read, groups = read_named([f"first={one}", two], [f"both=first,{two}"])
    assert [run.name for run in read] == ["first", "mixed-2"]
    assert groups["both"] == read
    read, groups = read_named([], [f"a={one}", f"b={one},{two}"])
    assert len(read) == 2
    assert groups["a"][0] is groups["b"][0]


@pytest.mark.parametrize(
    ("named", "groups", "told"),
    [
        ([], [], "no run is named"),
        (["a=x", "a=y"], [], "called a already"),
        ([], ["justaname"], "write NAME=RUN"),
        ([], ["a="], "at least one run"),
        ([], ["a=x", "a=y"], "a group a already"),
        (["/no/where"], [], "no such run"),
    ],
)
def test_mistakes_on_the_command_line(named: list[str], groups: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        read_named(named, groups)


def test_short_names_tell_folders_apart() -> None:
    assert short_names([Path("x/a/cpt"), Path("x/b/cpt"), Path("x/b/base")]) == ["a/cpt", "b/cpt", "base"]
    assert short_names([Path("/run")]) == ["run"]
