"""Items of tasks from local files, in the fields that lm_eval's own tasks read; nothing is fetched.

`FOLDER/TASK.jsonl[.gz]` holds rows as the task's data set on the hub has them. Besides, some tasks are found in the
forms in which they are passed around: question-and-choices rows, MMLU's archive of CSV files, PubMedQA's and MedQA's
own releases.
"""

import csv
import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from megacpt.errors import UserError

Item = dict[str, Any]
LETTERS = "ABCDEFGHIJ"
MMLU = "mmlu_"
MMLU_ARCHIVES = ("mmlu_csv.tar.gz", "mmlu.tar.gz")
PUBMEDQA = ("pubmedqa_ori_pqal.json.gz", "ori_pqal.json")
PUBMEDQA_TEST = ("pubmedqa_test_ground_truth.json", "test_ground_truth.json")
OTHER_NAMES = {
    "medmcqa": ("medmcqa_dev",),
    "medqa_4options": ("medqa_us_4opt_test", "phrases_no_exclude_test"),
    "openbookqa": ("openbook_qa",),
}
"""Further names that a task's rows go by."""
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


def _question_and_choices(item: Item) -> Item:
    if "question" in item:
        return item
    return {
        "question": item["query"].removeprefix("Question: "),
        "choices": {"text": item["choices"], "label": list(LETTERS[: len(item["choices"])])},
        "answerKey": LETTERS[item["gold"]],
    }


def _openbookqa(item: Item) -> Item:
    if "question_stem" in item:
        return item
    return {"question_stem": item["query"]} | {
        key: value for key, value in _question_and_choices(item).items() if key != "question"
    }


def _boolq(item: Item) -> Item:
    if "passage" in item:
        return item
    passage, _, question = item["query"].rpartition("\nQuestion: ")
    return {
        "passage": passage.removeprefix("Passage: "),
        "question": question.removesuffix("?"),
        "label": item["gold"],
    }


def _piqa(item: Item) -> Item:
    if "goal" in item:
        return item
    goal = item["query"].removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": item["choices"][0], "sol2": item["choices"][1], "label": item["gold"]}


def _winogrande(item: Item) -> Item:
    if "sentence" in item:
        return item
    first, second = item["context_options"]
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
    return {
        "sentence": f"{first[:shared]}_ {item['continuation']}",
        "option1": first[shared:],
        "option2": second[shared:],
        "answer": str(item["gold"] + 1),
    }


def _medqa(item: Item) -> Item:
    if "sent1" in item:
        return item
    options = {f"ending{i}": item["options"][letter] for i, letter in enumerate("ABCD")}
    return {"sent1": item["question"], **options, "label": LETTERS.index(item["answer_idx"])}


def _lambada(item: Item) -> Item:
    return item if "text" in item else {"text": f"{item['context']} {item['continuation']}"}


def _wikitext(item: Item) -> Item:
    return item if "page" in item else {"page": item["text"]}


FORMS: dict[str, Callable[[Item], Item]] = {
    "arc_easy": _question_and_choices,
    "arc_challenge": _question_and_choices,
    "boolq": _boolq,
    "lambada_openai": _lambada,
    "medqa_4options": _medqa,
    "openbookqa": _openbookqa,
    "piqa": _piqa,
    "wikitext": _wikitext,
    "winogrande": _winogrande,
}
"""From any known form of an item to the hub's fields; other tasks' items are taken as they are."""


@dataclass(frozen=True)
class TaskData:
    """A folder of task files."""

    folder: Path

    def check(self) -> None:
        """Refuse a folder that is not there.

        Raises:
            UserError: names it.
        """
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder of task data; check --task-data or eval.task_data")

    def find(self, task: str) -> Path | None:
        """The file that holds a task's items; None where there is none."""
        names = [f"{name}{end}" for name in (task, *OTHER_NAMES.get(task, ())) for end in ENDINGS]
        if task == "pubmedqa":
            names += PUBMEDQA
        found = next((self.folder / name for name in names if (self.folder / name).is_file()), None)
        if found is not None or not task.startswith(MMLU):
            return found
        archives = [self.folder / name for name in MMLU_ARCHIVES if (self.folder / name).is_file()]
        return next((archive for archive in archives if _holds(archive, task)), None)

    def items(self, task: str) -> list[Item]:
        """A task's items in the hub's fields, in the order of the file.

        Raises:
            UserError: the file is damaged, lacks a field, or holds no item.
        """
        path = self.find(task)
        if path is None:
            raise UserError(f"{self.folder}: holds no items of {task}; add {task}.jsonl, in the fields of its data set")
        try:
            items = self._read(path, task)
        except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as items of {task} ({error}); restore the file") from error
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: its rows are no items of {task} ({error!r}); see the task's data set") from error
        if not items:
            raise UserError(f"{path}: holds no item of {task}; restore the file")
        return items

    def _read(self, path: Path, task: str) -> list[Item]:
        if path.name in MMLU_ARCHIVES:
            return _mmlu(path, task)
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
        if path.name in PUBMEDQA:
            return self._pubmedqa(json.loads(text))
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        if len(rows) == 1 and isinstance(rows[0], list):
            rows = rows[0]
        if task == "medmcqa":
            return _medmcqa(rows)
        form = FORMS.get(task)
        return [form(row) for row in rows] if form is not None else rows

    def _pubmedqa(self, labelled: dict[str, Item]) -> list[Item]:
        """The release's own test half where its list is there, else all of it."""
        test = next((self.folder / name for name in PUBMEDQA_TEST if (self.folder / name).is_file()), None)
        chosen = labelled if test is None else json.loads(test.read_text(encoding="utf-8"))
        fields = ("QUESTION", "CONTEXTS", "final_decision")
        return [{field: labelled[number][field] for field in fields} for number in chosen]


def _medmcqa(rows: list[Item]) -> list[Item]:
    """The release counts the right option from 1, the hub's data set from 0."""
    from_one = min((row["cop"] for row in rows), default=0) >= 1
    fields = ("question", "opa", "opb", "opc", "opd")
    return [{field: row[field] for field in fields} | {"cop": row["cop"] - int(from_one)} for row in rows]


def _member(task: str) -> str:
    return f"data/test/{task.removeprefix(MMLU)}_test.csv"


def _holds(archive: Path, task: str) -> bool:
    """Whether a topic is in the archive; of one that cannot be read, reading it will tell."""
    try:
        with tarfile.open(archive) as files:
            return _member(task) in files.getnames()
    except (OSError, EOFError, zlib.error, tarfile.TarError):
        return True


def _mmlu(archive: Path, task: str) -> list[Item]:
    topic = task.removeprefix(MMLU)
    with tarfile.open(archive) as files:
        member = files.extractfile(_member(task))
        assert member is not None
        rows = list(csv.reader(io.TextIOWrapper(member, encoding="utf-8", newline="")))
    return [
        {"question": question, "subject": topic, "choices": choices, "answer": LETTERS.index(answer)}
        for question, *choices, answer in rows
    ]
