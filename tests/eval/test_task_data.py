"""Local files as items of lm_eval's tasks: known forms, the hub's own fields, and what is wrong with a file."""

import csv
import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from megacpt.errors import UserError
from megacpt.eval.suites import SUITES, select, tasks_of
from megacpt.eval.task_data import TaskData

HUB: dict[str, dict[str, Any]] = {
    "arc_easy": {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
    "boolq": {"passage": "P.", "question": "is it", "label": 1},
    "copa": {
        "premise": "It rained.",
        "question": "effect",
        "choice1": "It dried.",
        "choice2": "It got wet.",
        "label": 1,
    },
    "hellaswag": {
        "activity_label": "Cooking",
        "ctx_a": "A man cooks.",
        "ctx_b": "he",
        "endings": ["eats.", "sleeps.", "runs.", "flies."],
        "label": "0",
    },
    "medmcqa": {"question": "Q?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 0},
    "medqa_4options": {"sent1": "Q?", **{f"ending{i}": letter for i, letter in enumerate("wxyz")}, "label": 3},
    "mmlu_anatomy": {"question": "Q?", "subject": "anatomy", "choices": list("wxyz"), "answer": 2},
    "openbookqa": {"question_stem": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"},
    "piqa": {"goal": "open a jar", "sol1": "turn it", "sol2": "burn it", "label": 0},
    "pubmedqa": {"QUESTION": "Q?", "CONTEXTS": ["one", "two"], "final_decision": "maybe"},
    "race": {
        "article": "A.",
        "problems": str([{"question": "Q  _  .", "options": ["w", "x", "y", "z"], "answer": "C"}]),
    },
    "sciq": {
        "question": "Q?",
        "support": "S.",
        "distractor1": "w",
        "distractor2": "x",
        "distractor3": "y",
        "correct_answer": "z",
    },
    "winogrande": {"sentence": "The _ fell.", "option1": "cup", "option2": "cat", "answer": "1"},
}
"""An item of each task in the fields of its data set on the hub."""
HUB["arc_challenge"] = HUB["arc_easy"]
FORMS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("arc_easy", {"query": "Question: Q?", "choices": ["x", "y"], "gold": 1}, HUB["arc_easy"]),
    ("boolq", {"query": "Passage: P.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1}, HUB["boolq"]),
    ("openbookqa", {"query": "Q", "choices": ["x", "y"], "gold": 0}, HUB["openbookqa"]),
    ("piqa", {"query": "Question: open a jar\n", "choices": ["turn it", "burn it"], "gold": 0}, HUB["piqa"]),
    (
        "winogrande",
        {"context_options": ["The cup", "The cat"], "continuation": "fell.", "gold": 0},
        {"sentence": "The c_ fell.", "option1": "up", "option2": "at", "answer": "1"},
    ),
    (
        "medqa_4options",
        {"question": "Q?", "options": dict(zip("ABCD", "wxyz", strict=True)), "answer_idx": "D"},
        HUB["medqa_4options"],
    ),
    ("lambada_openai", {"context": "he said", "continuation": "yes"}, {"text": "he said yes"}),
    ("wikitext", {"text": "T", "license": "CC"}, {"page": "T"}),
]


def write(folder: Path, task: str, rows: list[dict[str, Any]]) -> TaskData:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{task}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return TaskData(folder)


@pytest.mark.parametrize(("task", "row", "expected"), FORMS)
def test_known_forms_become_the_hubs_fields(task: str, row: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    assert write(tmp_path, task, [row, row]).items(task) == [expected] * 2
    assert write(tmp_path, task, [expected]).items(task) == [expected]


def test_medmcqa_counts_from_one_or_from_zero(tmp_path: Path) -> None:
    from_zero = [HUB["medmcqa"] | {"cop": answer} for answer in (0, 3, 1)]
    from_one = [row | {"cop": row["cop"] + 1, "exp": None} for row in from_zero]
    assert write(tmp_path, "medmcqa", from_zero).items("medmcqa") == from_zero
    assert write(tmp_path, "medmcqa", from_one).items("medmcqa") == from_zero


def test_mmlu_from_its_archive_and_pubmedqa_from_its_release(tmp_path: Path) -> None:
    table = io.StringIO()
    csv.writer(table).writerow(["Q?", "w", "x, and\nmore", "y", "z", "C"])
    with tarfile.open(tmp_path / "mmlu_csv.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("data/test/anatomy_test.csv")
        member.size = len(table.getvalue().encode())
        archive.addfile(member, io.BytesIO(table.getvalue().encode()))
    data = TaskData(tmp_path)
    assert data.items("mmlu_anatomy") == [HUB["mmlu_anatomy"] | {"choices": ["w", "x, and\nmore", "y", "z"]}]
    assert data.find("mmlu_virology") is None
    labelled = {number: HUB["pubmedqa"] | {"QUESTION": number, "YEAR": "2011"} for number in ("1", "2", "3")}
    (tmp_path / "ori_pqal.json").write_text(json.dumps(labelled))
    assert [item["QUESTION"] for item in data.items("pubmedqa")] == ["1", "2", "3"]
    (tmp_path / "test_ground_truth.json").write_text(json.dumps({"3": "yes", "1": "no"}))
    assert [item["QUESTION"] for item in data.items("pubmedqa")] == ["3", "1"]


def test_what_is_wrong_with_a_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder of task data"):
        TaskData(tmp_path / "absent").check()
    data = TaskData(tmp_path)
    with pytest.raises(UserError, match=r"holds no items of piqa; add piqa\.jsonl"):
        data.items("piqa")
    for content, sentence in (
        ("", "holds no item of piqa"),
        ("{", "cannot be read as items of piqa"),
        ('{"query": 3}', "its rows are no items of piqa"),
    ):
        (tmp_path / "piqa.jsonl").write_text(content)
        with pytest.raises(UserError, match=sentence):
            data.items("piqa")
    (tmp_path / "copa.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"copa\.jsonl\.gz: cannot be read"):
        data.items("copa")
    (tmp_path / "mmlu_csv.tar.gz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"mmlu_csv\.tar\.gz: cannot be read as items of mmlu_anatomy"):
        data.items("mmlu_anatomy")


def test_selecting_suites_groups_and_tasks() -> None:
    chosen = select(["medical-table1", "medqa", "piqa", "piqa"])
    assert chosen.tasks[:3] == ("pubmedqa", "medmcqa", "medqa_4options")
    assert len(chosen.tasks) == 9
    assert chosen.groups == ("mmlu_medical",)
    assert chosen.suite_of("mmlu_anatomy") == chosen.suite_of("mmlu_medical") == "medical-table1"
    assert chosen.suite_of("piqa") is None


def test_every_task_of_the_suites_is_built_offline(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed; pip install 'megacpt[eval]'")
    from megacpt.eval.tasks import find_task, run_task
    from tests.eval.yes_man import YesMan

    wanted = {task for members in SUITES.values() for task in tasks_of(members)}
    for task in sorted(wanted):
        data = write(tmp_path, task, [HUB[task if task in HUB else "mmlu_anatomy"]] * 3)
        assert find_task(task, data).is_file()
        result = run_task(YesMan(), task, data, 2)
        assert len(result.items) == 2
        assert "acc" in result.metrics
        assert result.metrics["acc"].measure is not None
