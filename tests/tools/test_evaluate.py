"""tools/evaluate.py: what it writes, pairs and says, alone and on two ranks, and how it tells of mistakes."""

import contextlib
import functools
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megacpt.config.tree import Model
from megacpt.model.hf.unfinished import Report
from megacpt.runtime.setup import Layout, setup
from megacpt.train.exchange import Conversion, import_model
from megacpt.train.origin import open_hf
from tests.conftest import REPOSITORY
from tests.eval import readers
from tests.ranks import run_ranks
from tests.train.test_tasks import PIQA

pytest.importorskip("lm_eval", reason="lm_eval is not installed; pip install 'megacpt[eval]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` (a Hugging Face folder) and `data`."""
    place = tmp_path_factory.mktemp("evaluate")
    readers.make_reader(place / "base", bos=True)
    (place / "data").mkdir()
    (place / "data" / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PIQA))
    return place


@pytest.fixture(scope="module")
def tasks_of_lm_eval() -> Iterator[None]:
    """lm_eval reads thousands of files to know their names: once is enough."""
    import lm_eval.tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.tasks, "TaskManager", functools.cache(lm_eval.tasks.TaskManager))
        yield


def evaluate(arguments: list[str]) -> tuple[int, str]:
    """The tool on this rank; its exit code and what it said."""
    spec = importlib.util.spec_from_file_location("megacpt_tool_evaluate", REPOSITORY / "tools" / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Ranks share the stdout of whoever started the fork server, which pytest may have stopped capturing.
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = module.main(arguments)
    assert isinstance(code, int)
    return code, said.getvalue()


def test_results_items_and_a_comparison(folder: Path) -> None:
    common = [
        "--hf",
        str(folder / "base"),
        "--tasks",
        "piqa",
        "--suite",
        "general-10",
        "--task-data",
        str(folder / "data"),
    ]
    run_ranks(evaluate, 1, [*common, "--output", str(folder / "one.json")])
    compared = [*common, "--compare", str(folder / "one.jsonl"), "--tensor-model-parallel-size", "2"]
    (first, said), (second, nothing) = run_ranks(evaluate, 2, [*compared, "--output", str(folder / "two.json")])
    assert (first, second, nothing) == (0, 0, "")
    assert "general-10: no mean, absent: arc_challenge, arc_easy" in said
    assert "+0.0000 (+0.0000 to +0.0000) against the other, within the noise" in said
    one, two = (json.loads((folder / f"{name}.json").read_text()) for name in ("one", "two"))
    assert [row.get("value") for row in one["rows"]] == [row.get("value") for row in two["rows"]]
    suite = next(row for row in two["rows"] if "absent" in row)
    assert suite["value"] is None
    assert len(suite["absent"]) == 9
    accuracy = next(row for row in two["rows"] if row.get("metric") == "acc")
    assert accuracy["paired"] == {
        "iteration": None,
        "delta": 0.0,
        "low": 0.0,
        "high": 0.0,
        "significant": False,
        "items": 12,
    }
    items = [json.loads(line) for line in (folder / "two.jsonl").read_text().splitlines()]
    assert [len(item["loglikelihoods"]) for item in items] == [2] * 12


def test_ranks_that_share_each_text(folder: Path, tmp_path: Path) -> None:
    common = ["--hf", str(folder / "base"), "--tasks", "piqa", "--task-data", str(folder / "data"), "--dtype", "fp32"]
    for ranks in (1, 2):
        output = ["--output", str(tmp_path / f"{ranks}.json"), "--context-parallel-size", str(ranks)]
        assert [code for code, _ in run_ranks(evaluate, ranks, [*common, *output])] == [0] * ranks
    one, two = (
        [json.loads(line)["loglikelihoods"] for line in (tmp_path / f"{ranks}.jsonl").read_text().splitlines()]
        for ranks in (1, 2)
    )
    assert len(one) == 12
    assert two == [pytest.approx(item, rel=1e-5, abs=1e-5) for item in one]


@pytest.mark.usefixtures("tasks_of_lm_eval")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tasks", "piqua"], "no task or suite is named 'piqua'; did you mean 'piqa'?"),
        (["--suite", "medical-table2"], "did you mean 'medical-table1'?"),
        ([], "no task to run"),
        (["--tasks", "boolq"], "holds no items of boolq"),
        (["--tasks", "piqa", "--task-data", "nowhere"], "nowhere: no such folder of task data"),
        (["--tasks", "piqa", "--compare", "nowhere.jsonl"], "nowhere.jsonl: no file of items"),
        (["--tasks", "piqa", "--output", "results.txt"], "name a .json file"),
        (["--tasks", "piqa", "--hf", "nowhere"], "nowhere"),
        (["--tasks", "piqa", "--tensor-model-parallel-size", "2"], "cannot be divided into TP 2"),
        (["--tasks", "piqa", "--context-parallel-size", "2"], "x CP 2: start a multiple of 2"),
        (["--tasks", "piqa", "--tokenizer", "nowhere.json"], "nowhere.json: no such tokenizer file"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    arguments: list[str],
    sentence: str,
    folder: Path,
    load_tool: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = {"--hf": str(folder / "base"), "--task-data": str(folder / "data")}
    given = [part for name, value in common.items() if name not in arguments for part in (name, value)]
    assert load_tool("evaluate").main([*given, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: ")
    assert sentence in error[-1]


def test_without_lm_eval_it_says_what_to_install(
    folder: Path,
    load_tool: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("megacpt.eval.harness", "megacpt.eval.tasks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    arguments = ["--hf", str(folder / "base"), "--tasks", "piqa", "--task-data", str(folder / "data")]
    assert load_tool("evaluate").main(arguments) == 2
    assert "which is not installed; pip install 'megacpt[eval]'" in capsys.readouterr().err


def import_here(folder: Path) -> None:
    setup(Layout(1), seed=0, threads=1)
    import_model(open_hf(folder / "base"), Model(), Conversion(folder / "checkpoint", gate=False), Report())


def test_a_checkpoint_without_a_tokenizer(folder: Path, load_tool: Callable[[str], ModuleType], tmp_path: Path) -> None:
    readers.make_reader(tmp_path / "base", bos=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).unlink()
    run_ranks(import_here, 1, tmp_path)
    tool = load_tool("evaluate")
    common = ["--checkpoint", str(tmp_path / "checkpoint"), "--tasks", "piqa", "--task-data", str(folder / "data")]
    assert tool.main(common) == 2
    ((code, said),) = run_ranks(evaluate, 1, [*common, "--tokenizer", str(folder / "base"), "--limit", "2"])
    assert code == 0
    assert "2 items" in said
