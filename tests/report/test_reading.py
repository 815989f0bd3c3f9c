import fcntl
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megacpt.errors import UserError
from megacpt.report.folder import flattened, lock_is_held
from megacpt.report.reading import read_run
from megacpt.report.rows import NotYet, read_rows
from tests.report.runs import EVALUATIONS, rows_of, write_run


def metrics(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def validation(iteration: int, loss: Any, **more: Any) -> str:
    row = {"iteration": iteration, "consumed_tokens": 10 * iteration, "validation": "general", "loss": loss, **more}
    return json.dumps(row) + "\n"


def training(iteration: int, loss: float) -> str:
    row = {
        "iteration": iteration, "consumed_tokens": 10 * iteration, "lm_loss": loss, "learning_rate": 0.1,
        "grad_norm": 1, "tokens_per_second": 5, "iteration_ms": 2, "mfu": None, "loss_by_source": {"a": loss},
        "tokens_by_source": {"a": 10, "b": 0}, "epochs_by_source": {"a": iteration / 10, "b": 0},
    }  # fmt: skip
    return json.dumps(row) + "\n"


def test_every_kind_of_row(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", rows_of()), "run")
    keys = [metric.key for metric in run.metrics]
    assert keys[:4] == [(*("set", name), m) for m in ("accuracy", "loss") for name in ("medical", "general")]
    assert ("suite", "medical-table1", "mean") in keys
    assert ("task", "pubmedqa", "acc") in keys
    accuracy = run.metric(("set", "general", "accuracy"))
    assert accuracy is not None
    assert accuracy.curve.iteration.tolist() == list(EVALUATIONS)
    assert accuracy.curve.higher_is_better
    assert np.isfinite(accuracy.curve.low).all()
    assert accuracy.paired.keys() == set(EVALUATIONS) - {0}
    assert accuracy.gap is not None
    assert (accuracy.gap.basis, accuracy.gap.depth_is_significant) == ("paired", True)
    assert accuracy.paired[accuracy.gap.worst.iteration].delta == pytest.approx(-accuracy.gap.depth)
    task = run.metric(("task", "pubmedqa", "acc"))
    assert task is not None
    assert task.paired.keys() == set(EVALUATIONS) - {0}
    assert run.updates is not None
    assert run.updates.mean.shape == (len(EVALUATIONS) - 1, 6)
    assert run.probe is not None
    assert run.training.tokens.shape == (200,)
    assert run.domain == "medical"
    assert run.training.epochs_at(4096 * 100)["medical"] == pytest.approx(0.195)
    assert (run.ended, run.iteration, run.tokens) == (True, 200, 819200.0)
    assert run.provenance.config["model.preset"] == "tiny"
    assert run.provenance.seed == 1
    assert "ranks: 2" in run.provenance.announced


def test_a_run_of_validation_and_training_rows_alone(tmp_path: Path) -> None:
    folder = metrics(tmp_path / "run", validation(0, 5.0) + training(1, 4.0) + validation(1, 4.5))
    run = read_run(folder, "run")
    assert [metric.key for metric in run.metrics] == [("set", "general", "loss")]
    assert run.updates is run.probe is None
    assert np.isnan(run.metrics[0].curve.low).all()
    assert run.training.sources["b"].loss.tolist() == pytest.approx([np.nan], nan_ok=True)
    assert run.provenance.config == {}
    assert not run.ended


def test_what_is_paired_decides_before_intervals_do(tmp_path: Path) -> None:
    change = {"iteration": 0, "delta": 0.1, "low": 0.05, "high": 0.15}
    rows = validation(0, 5.0, loss_low=4.0, loss_high=6.0) + validation(1, 5.1, paired={"loss": change})
    (loss,) = read_run(metrics(tmp_path / "run", rows), "run").metrics
    assert loss.gap is not None
    assert (loss.gap.depth_is_significant, loss.gap.basis) == (True, "paired")
    for other in ({**change, "low": None}, {**change, "iteration": 1}, {"delta": "x", "iteration": 0}, 7, None):
        rows = validation(0, 5.0, loss_low=4.0, loss_high=6.0) + validation(1, 5.1, paired={"loss": other})
        (loss,) = read_run(metrics(tmp_path / "run", rows), "run").metrics
        assert loss.gap is not None
        assert (loss.gap.depth_is_significant, loss.gap.basis) == (False, "interval")


def test_rows_of_a_resumed_run_stand_for_those_before(tmp_path: Path) -> None:
    before = [training(n, 1.0) + validation(n, 1.0) for n in (1, 2, 3, 4)]
    after = [training(n, 2.0) + validation(n, 2.0) for n in (3,)]
    run = read_run(metrics(tmp_path / "run", "".join([*before, *after])), "run")
    assert run.training.iteration.tolist() == [1, 2, 3]
    assert run.training.loss.tolist() == [1, 1, 2]
    assert run.metrics[0].curve.value.tolist() == [1, 1, 2]


def test_a_guard_that_goes_back_stays_in_the_report(tmp_path: Path) -> None:
    guard = '{"iteration": 3, "consumed_tokens": 30, "guard": "g", "drop": 1, "max_drop": 0.5, "action": "rollback"}\n'
    text = "".join(training(n, 1.0) for n in (1, 2, 3)) + guard + training(2, 2.0)
    run = read_run(metrics(tmp_path / "run", text), "run")
    assert run.training.loss.tolist() == [1, 2]
    assert len(run.notices) == 1


def test_the_same_step_twice_counts_once(tmp_path: Path) -> None:
    run = read_run(metrics(tmp_path / "run", training(1, 1.0) + training(1, 3.0) + validation(1, 1) * 2), "run")
    assert run.training.loss.tolist() == [3.0]
    assert len(run.metrics[0].curve) == 1


def test_a_line_being_written_does_not_count(tmp_path: Path) -> None:
    run = read_run(metrics(tmp_path / "run", validation(0, 5.0) + validation(1, 4.0)[:-20]), "run")
    assert run.iteration == 0


def test_unknown_rows_nulls_and_nan(tmp_path: Path) -> None:
    unknown = '{"iteration": 0, "consumed_tokens": 0, "weather": "fine"}\n'
    text = unknown + validation(0, 5.0) + validation(1, float("nan")) + validation(2, None) + validation(3, 4.0)
    run = read_run(metrics(tmp_path / "run", text), "run")
    assert run.metrics[0].curve.iteration.tolist() == [0, 3]
    assert run.metrics[0].curve.dropped == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (validation(0, 5.0) + "{broken\n", "line 2 is damaged"),
        (validation(0, 5.0) + "[1]\n", "line 2 is no JSON object"),
        ("\xff\n", "line 1 is damaged"),
        (validation(0, "high"), "line 1: `loss` of a validation row is 'high'"),
        ('{"validation": "a", "iteration": 0}\n' + validation(0, 1), "`consumed_tokens` of a validation row is m"),
        ('{"validation": "a"}\n' * 2, "line 1: `iteration` of a validation row is missing"),
        ('{"iteration": 1, "consumed_tokens": 1, "lm_loss": 2, "tokens_by_source": 7}\n', "`tokens_by_source` of a tr"),
    ],
)  # fmt: skip
def test_damage_is_told_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        read_run(folder, "run")
    assert told in str(caught.value)
    assert "metrics.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run"):
        read_run(tmp_path / "absent", "absent")
    with pytest.raises(NotYet, match=r"no metrics\.jsonl"):
        read_run(tmp_path, "empty")
    with pytest.raises(NotYet, match="no rows in it yet"):
        read_run(metrics(tmp_path, ""), "begun")
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_a_damaged_configuration(tmp_path: Path) -> None:
    folder = metrics(tmp_path / "run", validation(0, 5.0))
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml: is no YAML"):
        read_run(folder, "run")


def test_guards_and_failures_are_notices(tmp_path: Path) -> None:
    common = {"iteration": 3, "consumed_tokens": 3}
    rows = [
        common | {"guard": "general accuracy", "drop": 0.1, "max_drop": 0.05, "action": "stop"},
        common | {"evaluation_error": "pubmedqa", "message": "it has no items."},
    ]
    run = read_run(metrics(tmp_path / "run", "".join(json.dumps(row) + "\n" for row in rows)), "run")
    assert run.notices == [
        "Iteration 3: evaluation of pubmedqa failed: it has no items.",
        "Iteration 3: the guard of general accuracy stopped the run (worse by 0.1, 0.05 allowed).",
    ]


def test_who_holds_a_lock_is_seen_without_asking_for_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    if lock_is_held(path) is None:
        pytest.skip("this system has no /proc/locks")
    assert lock_is_held(path) is False
    with open(path, "w") as handle:
        assert lock_is_held(path) is False
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert lock_is_held(path) is True


def test_flattened() -> None:
    assert flattened({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2], "e": {}}
