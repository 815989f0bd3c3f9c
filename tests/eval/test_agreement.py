"""An evaluation that fails ends on all ranks or on none; where it cannot, the run ends soon and says on which rank."""

import os
from pathlib import Path
from typing import Any

import pytest

from megacpt.errors import UserError
from megacpt.eval.agreement import sentence_of
from tests.eval.lose_rank import assert_lost
from tests.ranks import run_ranks
from tests.train import tiny


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    tiny.write_corpora(folder)
    return folder


@pytest.mark.parametrize("cut", [tiny.layout(tp=2), tiny.layout(pp=2)], ids=["tp2", "pp2"])
def test_a_validation_that_fails_on_one_rank_alone_ends_the_run(corpora: Path, tmp_path: Path, cut: tiny.Tree) -> None:
    torchrun = cut == tiny.layout(tp=2)
    assert_lost(1, tiny.tree(corpora, "lost", cut), tmp_path, torchrun=torchrun)


def crash(*_: Any, **__: Any) -> Any:
    raise RuntimeError("planted")


def train_with_a_failing_replica(tree: tiny.Tree) -> int:
    from megacpt.eval import validation

    if os.environ["RANK"] == "1":
        validation.score_micro_batches = crash
    return int(tiny.train_here(tree, 2)["iteration"])


def test_nobody_waits_for_a_data_parallel_replica(corpora: Path) -> None:
    tree = tiny.tree(corpora, "replica", {"train": {"train_iters": 2}})
    assert run_ranks(train_with_a_failing_replica, 2, tree) == [2, 2]
    failures = [row for row in tiny.rows(corpora / "replica") if "evaluation_error" in row]
    assert [(row["iteration"], row["evaluation_error"]) for row in failures] == [
        (iteration, name) for iteration in (0, 1, 2) for name in ("medical", "general")
    ]
    assert {row["message"] for row in failures} == {"RuntimeError: planted"}


def test_errors_in_a_line() -> None:
    assert sentence_of(UserError("no such file")) == sentence_of(OSError("no such\n  file")) == "no such file"
    assert sentence_of(KeyError("a")) == "KeyError: 'a'"
    assert sentence_of(ValueError()) == "ValueError"
