"""Tasks while a run trains: rows, pairs with step 0, and failures that are rows and not the end."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megacpt.config.load import config_from
from megacpt.errors import UserError
from tests.eval import readers
from tests.eval.lose_rank import assert_lost
from tests.ranks import run_ranks
from tests.train import tiny

pytest.importorskip("lm_eval", reason="lm_eval is not installed; pip install 'megacpt[eval]'")

PIQA = [
    {"goal": readers.words(start, 5), "sol1": readers.words(start + 1, 3), "sol2": "yes no maybe", "label": start % 2}
    for start in range(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora, a reading base model, and items of tasks: piqa whole, pubmedqa without an item, the rest absent."""
    place = tmp_path_factory.mktemp("tasks")
    tiny.write_corpora(place)
    readers.make_reader(place / "base", bos=True)
    (place / "data").mkdir()
    (place / "data" / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PIQA))
    (place / "data" / "pubmedqa.jsonl").write_text("")
    return place


def tree(folder: Path, run: str, *changes: tiny.Tree) -> tiny.Tree:
    shape = ("preset", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    base = tiny.tree(folder, run)
    base["model"] = {key: None for key in shape}
    base["data"]["sources"] = {"walks": {"path": str(folder / "walks"), "weight": 1.0}}
    base["train"] |= {"train_iters": 4}
    base["init"] = {"hf": str(folder / "base")}
    base["eval"] = {"tasks": ["piqa"], "task_data": str(folder / "data"), "at": [0], "every": 2}
    for change in changes:
        for section, keys in change.items():
            base[section] = base.get(section, {}) | keys
    return base


@pytest.fixture(scope="module", autouse=True)
def _walks(folder: Path) -> None:
    from tests.jobs import write_corpus

    write_corpus(folder / "walks", vocab_size=400)


def task_rows(run: Path) -> list[tiny.Tree]:
    return [row for row in tiny.rows(run) if {"task", "suite", "evaluation_error"} & row.keys()]


@pytest.fixture(scope="module")
def one(folder: Path, _walks: None) -> Path:
    """The run of one rank."""
    run_ranks(tiny.train_here, 1, tree(folder, "one"), 1)
    return folder / "one"


def loglikelihoods_at_0(run: Path) -> list[list[float]]:
    lines = (run / "tasks" / "iter_0000000.jsonl").read_text().splitlines()
    return [json.loads(line)["loglikelihoods"] for line in lines]


@pytest.mark.parametrize("name", ["one", "tp2-sp", "dp2-distributed", "pp2", "cp2"])
def test_rows_are_paired_with_step_0(name: str, folder: Path, one: Path) -> None:
    cut, world = {
        "one": ({}, 1),
        "tp2-sp": (tiny.layout(tp=2, sp=True), 2),
        "pp2": (tiny.layout(pp=2), 2),
        "cp2": ({"model": {"context_parallel_size": 2}}, 2),
        "dp2-distributed": (
            {
                "optimizer": {
                    "use_distributed_optimizer": True,
                    "overlap_grad_reduce": True,
                    "overlap_param_gather": True,
                }
            },
            2,
        ),
    }[name]
    run = folder / name
    if run != one:
        run_ranks(tiny.train_here, world, tree(folder, name, cut), world)
    rows = [row for row in task_rows(run) if row["metric"] == "acc"]
    assert [row["iteration"] for row in rows] == [0, 2, 4]
    first, *later = rows
    assert first["paired"] is None
    for row in rows:
        assert (row["task"], row["suite"], row["items"], row["higher_is_better"]) == ("piqa", None, 12, True)
        assert row["low"] <= row["value"] <= row["high"]
    for row in later:
        assert row["paired"]["iteration"] == 0
        assert row["paired"]["delta"] == pytest.approx(row["value"] - first["value"])
        assert row["paired"]["items"] == 12
    items = [json.loads(line) for line in (run / "tasks" / "iter_0000004.jsonl").read_text().splitlines()]
    assert len(items) == 12
    assert sum(item["metrics"]["acc"] for item in items) / 12 == pytest.approx(later[-1]["value"])
    found, expected = (loglikelihoods_at_0(place) for place in (run, one))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-4)


def test_losses_are_those_of_a_run_without_tasks(folder: Path, one: Path) -> None:
    run_ranks(tiny.train_here, 1, tree(folder, "without", {"eval": {"tasks": []}}), 1)
    (plain, norms), (found, found_norms) = tiny.losses(folder / "without"), tiny.losses(one)
    assert plain.tolist() == found.tolist()
    assert norms.tolist() == found_norms.tolist()


def train_with_faults(configuration: tiny.Tree, world: int, fault: str) -> None:
    """Training where evaluation goes wrong on rank 0, in the harness or in the model's numbers, or on every rank."""
    import megacpt.eval.live as live
    import megacpt.eval.scoring as scoring
    import megacpt.eval.tasks as tasks

    def crash(*_: Any, **__: Any) -> Any:
        raise RuntimeError("planted")

    if fault == "harness":
        tasks._record = crash
    if fault == "forward":
        scoring._run = crash
    if fault == "nan":
        original = scoring.vocabulary_parallel_scores
        scoring.vocabulary_parallel_scores = lambda *args: original(*args) * math.nan
    assert live.score is scoring.score
    tiny.train_here(configuration, world)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("harness", "RuntimeError: planted"),
        ("forward", "planted"),
        ("nan", "log-probabilities are NaN"),
        ("empty", "holds no item"),
    ],
)
def test_a_failed_evaluation_is_a_row_and_training_goes_on(fault: str, message: str, folder: Path) -> None:
    tasks = ["pubmedqa"] if fault == "empty" else ["piqa"]
    changes = {"eval": {"tasks": tasks, "every": 1}, "train": {"train_iters": 2}}
    run_ranks(train_with_faults, 2, tree(folder, f"fault-{fault}", tiny.layout(tp=2), changes), 2, fault)
    run = folder / f"fault-{fault}"
    errors = [row for row in task_rows(run) if "evaluation_error" in row]
    assert {row["iteration"] for row in errors} == {0, 1, 2}
    assert errors[0]["evaluation_error"] == ("pubmedqa" if fault == "empty" else "piqa")
    assert message in " ".join(row["message"] for row in errors)
    assert len(tiny.losses(run)[0]) == 2
    assert ": NaN" not in (run / "metrics.jsonl").read_text()
    assert "failed" in (run / "train.log").read_text()


def test_a_task_that_fails_on_one_rank_alone_ends_the_run(folder: Path, tmp_path: Path) -> None:
    assert_lost(0, tree(folder, "lost", tiny.layout(tp=2)), tmp_path)


def test_a_suite_names_what_is_absent(folder: Path) -> None:
    changes = {"eval": {"tasks": ["general-10"], "every": None}, "train": {"train_iters": 1}}
    run_ranks(tiny.train_here, 1, tree(folder, "suite", changes), 1)
    (row,) = [row for row in task_rows(folder / "suite") if "absent" in row]
    assert row["suite"] == "general-10"
    assert row["value"] is None
    assert len(row["absent"]) == 9
    assert "piqa" not in row["absent"]
    assert row["tasks"].keys() == {"piqa"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"eval": {"tasks": ["boolq"]}}, "holds no items of boolq"),
        ({"eval": {"task_data": "nowhere"}}, "nowhere: no such folder of task data"),
        ({"eval": {"task_data": None}}, "no folder of items"),
        ({"init": {"hf": None}}, "no tokenizer is known"),
    ],
)
def test_mistakes_are_told_before_training(
    changes: tiny.Tree, sentence: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megacpt.train.planning import make_plan

    monkeypatch.delenv("MEGACPT_TASK_DATA", raising=False)
    configuration = tree(folder, "mistaken", changes)
    if configuration["init"]["hf"] is None:
        configuration["model"] = tiny.tree(folder, "mistaken")["model"]
    with pytest.raises(UserError, match=sentence):
        make_plan(config_from(configuration, "test"), 1, on_gpu=False)
