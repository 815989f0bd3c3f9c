"""The real SmolLM2-135M: every item of real tasks gets the log-probabilities that lm_eval's `hf` model gives it.

MEGACPT_TASK_LIMIT items of each task (default 3). The weights are a folder that transformers reads, exported from the
GGUF file; tools/evaluate.py reads the checkpoint.
"""

import contextlib
import gzip
import importlib.util
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.eval.readers import reference
from tests.model.hf.test_smollm2 import find_gguf, import_and_export
from tests.ranks import run_ranks

pytest.importorskip("lm_eval", reason="lm_eval is not installed; pip install 'megacpt[eval]'")
pytestmark = pytest.mark.slow

LIMIT = int(os.environ.get("MEGACPT_TASK_LIMIT", "3"))
TASKS = ["pubmedqa", "medqa_4options", "medmcqa", "arc_easy", "piqa", "wikitext"]
CUTS = {"TP1": (1, 1), "TP3": (3, 1), "PP2": (1, 2)}
WINDOW = 512
"""Tokens of a window; of the model's 8,192 a CPU would be busy for long."""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoint` and `model` (the exported folder)."""
    gguf = find_gguf()
    if gguf is None:
        pytest.skip("SmolLM2 is not here; run make quickstart MODEL=smollm2, or set MEGACPT_SMOLLM2")
    folder = tmp_path_factory.mktemp("gguf")
    (folder / gguf.name).symlink_to(gguf)
    output = tmp_path_factory.mktemp("smollm2")
    run_ranks(import_and_export, 1, folder, output)
    return output


@pytest.fixture(scope="module")
def data(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluation sets, and some texts for a rolling perplexity."""
    folder = tmp_path_factory.mktemp("data")
    for path in (shared / "data" / "eval").iterdir():
        (folder / path.name).symlink_to(path)
    with gzip.open(shared / "data" / "general" / "wikipedia_wikitext2.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"][:4000] for line, _ in zip(lines, range(max(2, LIMIT // 10)), strict=False)]
    (folder / "wikitext.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def by_hf(model: Path, data: Path) -> dict[str, list[dict[str, Any]]]:
    from megacpt.eval.task_data import TaskData
    from megacpt.eval.tasks import run_task

    lm = reference(model, max_length=WINDOW)
    return {task: run_task(lm, task, TaskData(data), LIMIT).items for task in TASKS}


def by_tool(arguments: list[str]) -> str:
    """tools/evaluate.py on this rank."""
    spec = importlib.util.spec_from_file_location("megacpt_tool_evaluate", REPOSITORY / "tools" / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert module.main(arguments) == 0
    return said.getvalue()


@pytest.fixture(scope="module")
def expected(smollm2: Path, data: Path) -> dict[str, list[dict[str, Any]]]:
    return by_hf(smollm2 / "model", data)


@pytest.mark.parametrize("cut", CUTS)
def test_items_are_those_of_hf(
    cut: str, smollm2: Path, data: Path, expected: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    tp, pp = CUTS[cut]
    output = tmp_path / "results.json"
    arguments = ["--checkpoint", str(smollm2 / "checkpoint"), "--tasks", ",".join(TASKS), "--limit", str(LIMIT)]
    arguments += ["--task-data", str(data), "--output", str(output), "--max-length", str(WINDOW)]
    arguments += ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    run_ranks(by_tool, tp * pp, arguments)
    found = [json.loads(line) for line in output.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    largest = {}
    for task, items in expected.items():
        mine = [item for item in found if item["task"] == task]
        assert [item["item"] for item in mine] == [item["item"] for item in items]
        if task != "wikitext":
            assert [(item["metrics"], item["greedy"]) for item in mine] == [(i["metrics"], i["greedy"]) for i in items]
            pairs = [(a["loglikelihoods"], b["loglikelihoods"]) for a, b in zip(mine, items, strict=True)]
            largest[task] = max(float(np.abs(np.subtract(a, b)).max()) for a, b in pairs)
            assert largest[task] <= 1e-3
        else:
            pairs = [
                (a["metrics"]["bits_per_byte"], b["metrics"]["bits_per_byte"]) for a, b in zip(mine, items, strict=True)
            ]
            largest["wikitext, relative"] = max(abs(a[0] / b[0] - 1) for a, b in pairs)
            assert largest["wikitext, relative"] <= 1e-5
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    print(
        f"{cut}, {LIMIT} items: largest differences {largest}; rows",
        [(r["task"], r["metric"], r["value"]) for r in rows],
    )
