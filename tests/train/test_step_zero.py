"""Validations are paired with step 0 sample by sample, after a resume too, and only with the same samples."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from megacpt.config.load import config_from
from megacpt.errors import UserError
from megacpt.eval.validation import Validation
from megacpt.train.planning import make_plan
from megacpt.train.step_zero import FILE, StepZero
from tests.ranks import run_ranks
from tests.train import tiny

STOP = {"train": {"train_iters": 4}, "eval": {"every": 4}}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    tiny.write_corpora(folder)
    run_ranks(tiny.train_here, 2, tiny.tree(folder, "run", STOP, tiny.layout(tp=2)), 2)
    return folder


def validations(run: Path, name: str) -> list[tiny.Tree]:
    return [row for row in tiny.rows(run) if row.get("validation") == name]


def test_rows_hold_the_difference_from_step_0_on_the_same_samples(corpora: Path) -> None:
    for name in ("medical", "general"):
        first, *later = validations(corpora / "run", name)
        assert first["paired"] is None
        assert [row["iteration"] for row in later] == [1, 4]
        for row in later:
            for measure in ("loss", "accuracy"):
                paired = row["paired"][measure]
                assert paired["iteration"] == 0
                assert paired["items"] == -(-row["tokens"] // 32)
                assert paired["delta"] == pytest.approx(row[measure] - first[measure], abs=1e-12)
                assert paired["low"] <= paired["delta"] <= paired["high"]
                assert paired["significant"] == (paired["low"] > 0 or paired["high"] < 0)


def test_a_resumed_run_pairs_what_is_the_same(corpora: Path) -> None:
    changes = {
        "fewer": ({"eval": {"iters": 1}}, {"medical": 8, "general": 8}),
        "more": ({"eval": {"iters": 1000}}, {"medical": 16, "general": 16}),
        "others": ({"eval": {"sets": {"medical": str(corpora / "general")}}}, {"medical": None, "general": 16}),
    }
    for name, (change, expected) in changes.items():
        shutil.copytree(corpora / "run", corpora / name)
        tree = tiny.tree(corpora, name, tiny.layout(tp=2), {"train": {"train_iters": 6}}, change)
        run_ranks(tiny.train_here, 2, tree, 2)
        for of, items in expected.items():
            *_, last = validations(corpora / name, of)
            assert last["iteration"] == 6
            assert (last["paired"] and last["paired"]["loss"]["items"]) == items


def test_what_is_kept(corpora: Path, tmp_path: Path) -> None:
    sets = make_plan(config_from(tiny.tree(corpora, "new"), "test"), 1, on_gpu=False).eval_sets
    samples = np.array([[1 / 3, 2, 3], [4.1, 5, 6]])
    StepZero.open(tmp_path, resumes=False).keep({"medical": (sets["medical"], Validation(samples))})
    again = StepZero.open(tmp_path, resumes=True)
    assert again.base("medical", sets["medical"]) == {
        "loss": {"0": (1 / 3, 3.0), "1": (4.1, 6.0)},
        "accuracy": {"0": (2.0, 3.0), "1": (5.0, 6.0)},
    }
    assert again.base("general", sets["general"]) is None
    assert again.base("medical", sets["general"]) is None
    for text in (
        "{",
        '{"format": "other"}',
        '{"format": "megacpt validation 1", "sets": {"medical": {"samples": [1]}}}',
    ):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(UserError, match=rf"{FILE}: damaged"):
            StepZero.open(tmp_path, resumes=True)
    assert StepZero.open(tmp_path, resumes=False).sets == {}
    assert StepZero.open(tmp_path, resumes=True).sets == {}
