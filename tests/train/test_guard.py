"""The guard against forgetting and the best checkpoint: decisions on constructed rows, and whole runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.config.load import config_from
from megacpt.config.tree import Best, Guard
from megacpt.errors import UserError
from megacpt.train.checkpoint import find_checkpoint
from megacpt.train.guard import Watch, scores, weighted_sum
from megacpt.train.planning import make_plan
from megacpt.train.rows import Row
from tests.ranks import run_ranks
from tests.train import tiny

METRIC = "validation/general/loss"


def validation(iteration: int, **values: float) -> Row:
    return {"iteration": iteration, "validation": "general"} | values


def task(iteration: int, value: float | None, higher: bool = True) -> Row:
    return {"iteration": iteration, "task": "pubmedqa", "metric": "acc", "value": value, "higher_is_better": higher}


@pytest.mark.parametrize(
    ("metric", "rows", "drop"),
    [
        ("validation/general/accuracy", [validation(0, accuracy=0.5), validation(3, accuracy=0.4)], 0.1),
        ("validation/general/loss", [validation(0, loss=2.0), validation(3, loss=2.25)], 0.25),
        ("validation/general/loss", [validation(0, loss=2.0), validation(3, loss=1.0)], None),
        ("validation/general/loss", [validation(0, loss=2.0), validation(3, loss=2.0625)], None),  # just allowed
        ("validation/general/loss", [validation(3, loss=9.0)], None),
        ("validation/general/loss", [validation(0, loss=2.0), validation(2, loss=9.0)], None),
        ("validation/general/loss", [validation(0, loss=2.0), validation(3, loss=float("nan"))], None),
        ("task/pubmedqa/acc", [task(0, 0.7), task(3, 0.5)], 0.2),
        ("task/pubmedqa/acc", [task(0, 0.7, False), task(3, 0.9, False)], 0.2),
        ("task/pubmedqa/acc", [task(0, 0.7), task(3, None)], None),
        (
            "suite/general-10/mean",
            [{"iteration": i, "suite": "general-10", "metric": "mean", "value": v} for i, v in ((0, 0.6), (3, 0.1))],
            0.5,
        ),
    ],
)
def test_a_drop_is_against_step_0(metric: str, rows: list[Row], drop: float | None) -> None:
    verdict = Watch(Guard(metric=metric, max_drop=0.0625, action="stop"), None, rows).judge(3)
    if drop is None:
        assert verdict.drop is None
        assert verdict.ends_on is None
    else:
        assert verdict.drop is not None
        assert verdict.drop.drop == pytest.approx(drop)
        assert verdict.ends_on == 3


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=9))
def test_the_best_is_the_first_of_the_largest_weighted_sums(values: list[tuple[float, float]]) -> None:
    best = Best(weights={METRIC: -1.0, "validation/general/accuracy": 2.0})
    watch = Watch(None, best)
    saved = []
    for iteration, (loss, accuracy) in enumerate(values):
        watch.rows.append(validation(iteration, loss=loss, accuracy=accuracy))
        saved += [iteration] if watch.judge(iteration).saves else []
    sums = [weighted_sum(best.weights, scores(watch.rows, i)) for i in range(1, len(values))]
    if not sums:
        assert watch.best is None
        return
    assert watch.best is not None
    assert watch.best.iteration == saved[-1] == 1 + sums.index(max(s for s in sums if s is not None))


def test_without_one_of_its_metrics_an_evaluation_is_no_candidate() -> None:
    watch = Watch(None, Best(weights={METRIC: -1.0, "task/pubmedqa/acc": 1.0}), [validation(1, loss=1.0)])
    assert not watch.judge(1).saves


def configuration(folder: Path, run: str, *changes: tiny.Tree) -> tiny.Tree:
    """The general loss rises once the learning rate has grown: medicine alone, high rate."""
    medical: tiny.Tree = {
        "data": {"sources": {"general": {"weight": 0.0}}},
        "train": {"train_iters": 8},
        "optimizer": {"lr": 0.05},
        "schedule": {"lr_decay_style": "constant", "lr_warmup_fraction": 0.5},
        "eval": {"every": 1},
        "save": {"interval": None, "keep_last": 1},
    }
    return tiny.tree(folder, run, medical, *changes)


def guarded(max_drop: float, action: str) -> tiny.Tree:
    return {"guard": {"metric": METRIC, "max_drop": max_drop, "action": action}}


BEST = {"save": {"best": {"weights": {METRIC: -1.0}}}}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    tiny.write_corpora(folder)
    return folder


@pytest.fixture(scope="module")
def losses(corpora: Path) -> dict[int, float]:
    """The general loss of a run that nothing ends; a warning changes nothing but rows and the log."""
    tree = configuration(corpora, "warned", guarded(0.01, "warn"))
    run_ranks(tiny.train_here, 1, tree, 1)
    found = {
        row["iteration"]: row["loss"] for row in tiny.rows(corpora / "warned") if row.get("validation") == "general"
    }
    warnings = [row for row in tiny.rows(corpora / "warned") if "guard" in row]
    over = [i for i, loss in found.items() if loss - found[0] > 0.01]
    assert [row["iteration"] for row in warnings] == over
    assert all(row["action"] == "warn" for row in warnings)
    assert over
    return found


def first_over(losses: dict[int, float], max_drop: float) -> int:
    return next(i for i, loss in losses.items() if loss - losses[0] > max_drop)


def test_a_stopped_run_is_saved_and_says_why(corpora: Path, losses: dict[int, float]) -> None:
    limit = (max(losses.values()) - losses[0]) / 2
    tree = configuration(corpora, "stopped", guarded(limit, "stop"), tiny.layout(tp=2))
    end = first_over(losses, limit)
    assert run_ranks(tiny.train_here, 2, tree, 2)[0]["iteration"] == end
    run = corpora / "stopped"
    assert [row["action"] for row in tiny.rows(run) if "guard" in row] == ["stop"]
    assert find_checkpoint(run) == run / "checkpoints" / f"iter_{end:07d}"
    before = tiny.rows(run)
    assert run_ranks(tiny.train_here, 2, tree, 2)[0]["iteration"] == end
    assert tiny.rows(run) == before
    plan = make_plan(config_from(tree, "test"), 2, on_gpu=False)
    assert f"the guard ended this run after iteration {end}: {METRIC} had risen by" in str(plan.ended)
    # With another limit the run goes on, and says that it had been ended.
    onwards = configuration(corpora, "stopped", guarded(99.0, "stop"), tiny.layout(tp=2))
    plan = make_plan(config_from(onwards, "test"), 2, on_gpu=False)
    assert plan.ended is None
    assert "goes on, for guard.max_drop is 99 now" in plan.notes[-1]
    assert run_ranks(tiny.train_here, 2, onwards, 2)[0]["iteration"] == 8


def test_a_rolled_back_run_ends_on_the_best(corpora: Path, losses: dict[int, float]) -> None:
    limit = (max(losses.values()) - losses[0]) / 2
    end = first_over(losses, limit)
    best = min(range(1, end), key=lambda i: losses[i])
    tree = configuration(corpora, "back", guarded(limit, "rollback"), BEST)
    run_ranks(tiny.train_here, 1, tree, 1)
    checkpoints = corpora / "back" / "checkpoints"
    assert (checkpoints / "best_checkpointed_iteration.txt").read_text() == f"{best}\n"
    assert find_checkpoint(corpora / "back") == checkpoints / f"iter_{best:07d}"
    record = json.loads((corpora / "back" / "guard.json").read_text())
    assert (record["iteration"], record["resumes_at"], record["drop"]["metric"]) == (end, best, METRIC)
    # The same command again: nothing is trained, and the rows of the dip stay.
    before = tiny.rows(corpora / "back")
    run_ranks(tiny.train_here, 1, tree, 1)
    assert tiny.rows(corpora / "back") == before
    assert before[-1]["iteration"] == end


def test_the_best_checkpoint_outlives_keep_last(corpora: Path, losses: dict[int, float]) -> None:
    tree = configuration(corpora, "best", BEST, {"save": {"interval": 2}})
    run_ranks(tiny.train_here, 1, tree, 1)
    best = min(range(1, 9), key=lambda i: losses[i])
    checkpoints = corpora / "best" / "checkpoints"
    assert {path.name for path in checkpoints.glob("iter_*")} == {f"iter_{best:07d}", "iter_0000008"}
    assert (checkpoints / "best_checkpointed_iteration.txt").read_text() == f"{best}\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guard": {"metric": "validation/law/loss", "max_drop": 1}}, "names a set that eval.sets does not have"),
        ({"guard": {"metric": "general/loss", "max_drop": 1}}, "is no metric; write validation/SET"),
        ({"guard": {"metric": METRIC, "max_drop": 1}, "eval": {"at": [1]}}, "put 0 into eval.at"),
        ({"guard": {"metric": "task/pubmedqa/acc", "max_drop": 1}}, "eval.tasks names none"),
        ({"guard": {"metric": METRIC, "max_drop": 1, "action": "rollback"}}, "say which is best in save.best"),
        ({"save": {"best": {"weights": {}}}}, "save.best.weights is empty"),
        ({"save": {"best": {"weights": {"validation/general/f1": 1}}}}, "save.best.weights: 'validation/general/f1'"),
    ],
)
def test_refusals(corpora: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_plan(config_from(tiny.tree(corpora, "never", changes), "test"), 1, on_gpu=False)
