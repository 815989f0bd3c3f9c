"""Rows, lines and files of items, from results whose values are known."""

import json
from pathlib import Path

import numpy as np
import pytest

from megacpt.errors import UserError
from megacpt.eval.results import line_of, read_items, rows_of, write_items
from megacpt.eval.statistics import Measure
from megacpt.eval.suites import MMLU_MEDICAL, select

tasks = pytest.importorskip("megacpt.eval.tasks", reason="lm_eval is not installed", exc_type=UserError)


def result(task: str, values: list[float]) -> "tasks.TaskResult":
    keys = tuple(f"{number}:hash" for number in range(len(values)))
    measure = Measure(f"{task}/acc", keys, np.array(values), np.ones(len(values)))
    items = [{"task": task, "item": key, "metrics": {"acc": value}} for key, value in zip(keys, values, strict=True)]
    return tasks.TaskResult(task, {"acc": tasks.Metric(measure.value, True, measure)}, items)


def evaluation(**values: list[float]) -> "tasks.Evaluation":
    return tasks.Evaluation({task: result(task, list(numbers)) for task, numbers in values.items()}, {})


MEDICAL = {"pubmedqa": [1.0, 0.0], "medmcqa": [1.0], "medqa_4options": [0.0, 0.0]} | {
    task: [1.0] * (number == 0) + [0.0] * 4 for number, task in enumerate(MMLU_MEDICAL)
}


def test_mmlu_is_one_of_four_in_the_mean_of_table_1() -> None:
    rows = rows_of(evaluation(**MEDICAL), select(["medical-table1"]), None, None)
    group = next(row for row in rows if row.get("task") == "mmlu_medical")
    assert group["value"] == pytest.approx(0.2 / 5)
    assert group["items"] == 21
    suite = rows[-1]
    assert suite["tasks"] == {
        "pubmedqa": 0.5,
        "medmcqa": 1.0,
        "medqa_4options": 0.0,
        "mmlu_medical": pytest.approx(0.04),
    }
    assert suite["value"] == pytest.approx((0.5 + 1.0 + 0.0 + 0.04) / 4)
    assert suite["absent"] == []
    assert "medical-table1 mean of 4: 0.3850" in line_of(suite)


def test_an_absent_task_withholds_the_mean() -> None:
    found = {task: values for task, values in MEDICAL.items() if task != "mmlu_anatomy"}
    *_, suite = rows_of(evaluation(**found), select(["medical-table1"]), None, None)
    assert (suite["value"], suite["low"], suite["absent"]) == (None, None, ["mmlu_anatomy"])
    assert "mmlu_medical" not in suite["tasks"]
    assert line_of(suite) == "medical-table1: no mean, absent: mmlu_anatomy"


def test_a_metric_that_is_no_number_is_an_error_beside_its_row() -> None:
    rows = rows_of(evaluation(piqa=[float("nan"), 1.0]), select(["piqa", "general-10"]), None, None)
    assert rows[0]["value"] is None
    assert rows[1]["value"] is None
    assert "piqa" in rows[1]["absent"]
    assert rows[2] == {"evaluation_error": "piqa", "message": "its acc is nan"}
    json.dumps(rows, allow_nan=False)


def test_a_drop_is_significant_by_the_same_items(tmp_path: Path) -> None:
    before = [1.0] * 200 + [0.0] * 200
    write_items(tmp_path / "base.jsonl", evaluation(piqa=before))
    base = read_items(tmp_path / "base.jsonl")
    now = evaluation(piqa=[0.0] * 12 + before[12:])
    (row,) = rows_of(now, select(["piqa"]), base, 0)
    assert row["paired"]["delta"] == pytest.approx(-0.03)
    assert row["paired"]["significant"]
    assert row["paired"]["items"] == 400
    assert "against iteration 0, significant" in line_of(row)


def test_a_file_that_holds_no_items(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"iteration": 3}\n')
    with pytest.raises(UserError, match=r"other\.jsonl: no file of items"):
        read_items(tmp_path / "other.jsonl")
