"""The command line that trains a model, and what keeps a model from being used wrongly."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megacpt.data.scores import kenlm_build
from megacpt.data.scores.kenlm_build import find_programs
from megacpt.data.scores.kenlm_model import read_record
from megacpt.data.scores.kneser_ney import EDGES
from megacpt.files import sha256_of
from tests.tools.conftest import TEXTS, Run

Refuse = Callable[..., None]


def test_the_record_of_a_model(small: Path) -> None:
    record = read_record(small / "model.arpa")
    assert record is not None
    assert record.sha256 == sha256_of(small / "model.arpa")
    assert (record.order, record.file) == (3, "arpa")
    assert record.normalization == {
        "lowercase": True,
        "strip_accents": True,
        "digits_to_zero": True,
        "punctuation": "map",
    }
    assert record.reference["documents"] == len(TEXTS[::2])
    assert record.reference["inputs"][0]["sha256"] == sha256_of(small / "reference.jsonl")
    assert record.trainer["program"] == "megacpt.data.scores.kneser_ney"
    assert len(record.ngrams) == 3
    assert record.ngrams[0] > len(EDGES)


@pytest.mark.parametrize("structure", ["probing", "quantized_trie"])
def test_lmplz_makes_the_same_model(small: Path, tmp_path: Path, run: Run, structure: str) -> None:
    if find_programs() is None:
        pytest.skip("lmplz is neither in KENLM_BIN, on PATH nor in the cache")
    kenlm = pytest.importorskip("kenlm")
    model = tmp_path / "model.binary"
    given = ["--input", small / "reference.jsonl", "--output", model, "--order", "3", "--structure", structure]
    code, out, err = run("train_kenlm", *given, "--trainer", "lmplz", "--memory", "200M")
    assert code == 0, err
    assert f"3-grams of {read_record(small / 'model.arpa').reference['words']:,} words" in out
    ours, theirs = kenlm.Model(str(small / "model.arpa")), kenlm.Model(str(model))
    for sentence in ("the import statement is used", "a class definition defines a class object"):
        assert theirs.score(sentence) == pytest.approx(
            ours.score(sentence), abs=1e-3 if structure == "probing" else 0.3
        )
    assert read_record(model).reference == read_record(small / "model.arpa").reference


def test_lmplz_prunes(small: Path, tmp_path: Path, run: Run) -> None:
    if find_programs() is None:
        pytest.skip("lmplz is neither in KENLM_BIN, on PATH nor in the cache")
    given = [
        "--input",
        small / "reference.jsonl",
        "--output",
        tmp_path / "m",
        "--order",
        "3",
        "--pruning",
        "0",
        "0",
        "1",
    ]
    assert run("train_kenlm", *given, "--memory", "200M")[0] == 0
    record, whole = read_record(tmp_path / "m"), read_record(small / "model.arpa")
    assert record.ngrams[:2] == whole.ngrams[:2]
    assert record.ngrams[2] < whole.ngrams[2]
    assert record.trainer["options"][-4:] == ["--prune", "0", "0", "1"]


def test_overlap_is_a_warning(small: Path, tmp_path: Path, run: Run) -> None:
    items = [{"question": "unheard of"}, {"question": TEXTS[2][:600]}]
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    given = ["--input", small / "reference.jsonl", "--output", tmp_path / "m", "--trainer", "python", "--order", "2"]
    code, _, err = run("train_kenlm", *given, "--eval-set", tmp_path / "exam.jsonl")
    assert code == 0
    assert err == "warning: the reference overlaps exam.jsonl: 1 of 2 items share 13 words in a row: exam.jsonl:2\n"
    assert read_record(tmp_path / "m").overlap[0]["overlapping"] == 1
    reference = ["--reference", small / "reference.jsonl", "--eval-set", tmp_path / "exam.jsonl"]
    code, out, _ = run("overlap", *reference)
    assert (code, out) == (0, "exam.jsonl: 1 of 2 items share 13 words in a row: exam.jsonl:2\n")


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("no file matches", ["--input", "nowhere.jsonl"]),
        ("--order 7", ["--order", "7"]),
        ("--pruning 1 0", ["--pruning", "1", "0"]),
        ("--pruning needs lmplz", ["--pruning", "0", "1"]),
        ("no key 'body'", ["--json-key", "body"]),
        ("this evaluation set cannot be read", ["--eval-set", "nowhere.jsonl"]),
        ("exists already", ["--output", "reference.jsonl"]),
    ],
)
def test_bad_commands(small: Path, tmp_path: Path, refuse: Refuse, words: str, options: list[str]) -> None:
    shutil.copy(small / "reference.jsonl", tmp_path)
    placed = [tmp_path / option if option.endswith(".jsonl") else option for option in options]
    base = ["--input", small / "reference.jsonl", "--output", tmp_path / "m", "--trainer", "python"]
    refuse(words, "train_kenlm", *base, *placed)
    assert [path.name for path in tmp_path.iterdir()] == ["reference.jsonl"]


@pytest.mark.parametrize(
    ("words", "output"),
    [
        ("reference.jsonl: is read by this command", "reference.jsonl"),
        ("text.json: is read by this command", "text"),
        ("exam.jsonl: is read by this command", "exam.jsonl"),
        ("folder: is a folder", "folder"),
    ],
)
def test_what_is_read_is_not_replaced(small: Path, tmp_path: Path, refuse: Refuse, words: str, output: str) -> None:
    for name in ("reference.jsonl", "text.json", "exam.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "folder").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    given = ["--input", tmp_path / "reference.jsonl", tmp_path / "text.json", "--eval-set", tmp_path / "exam.jsonl"]
    refuse(words, "train_kenlm", *given, "--order", "2", "--output", tmp_path / output, "--overwrite")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_what_building_needs_is_named(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Refuse, run: Run
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KENLM_BIN", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(kenlm_build, "INCLUDES", ())
    base = ["--input", small / "reference.jsonl", "--output", tmp_path / "m", "--order", "2"]
    needs = "cmake, make, g++, libboost-program-options-dev, libboost-system-dev, libboost-thread-dev"
    refuse(f"cannot be built without {needs}; install them", "train_kenlm", *base, "--trainer", "lmplz")
    code, _, err = run("train_kenlm", *base)
    assert code == 0
    assert "few enough for the trainer in Python" in err
    monkeypatch.setenv("KENLM_BIN", str(tmp_path))
    refuse("holds no program lmplz", "train_kenlm", *base, "--overwrite")


def test_as_a_program(small: Path, tmp_path: Path) -> None:
    tool = Path(__file__).resolve().parents[2] / "tools" / "train_kenlm.py"
    done = subprocess.run(
        [sys.executable, tool, "--input", "x", "--output", tmp_path / "m"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: x: no file matches")


def test_kill_9_leaves_nothing_for_ever(small: Path, tmp_path: Path, run: Run, refuse: Refuse) -> None:
    (tmp_path / "in").mkdir()
    corpus, output = tmp_path / "in" / "big.jsonl", tmp_path / "out" / "m"
    corpus.write_bytes((small / "reference.jsonl").read_bytes() * 100)
    tool = Path(__file__).resolve().parents[2] / "tools" / "train_kenlm.py"
    command = [sys.executable, tool, "--input", corpus, "--output", output, "--trainer", "python"]
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/.*/text")) and time.monotonic() < deadline:
        time.sleep(0.01)
    again = ["--input", small / "reference.jsonl", "--output", output, "--trainer", "python", "--order", "2"]
    refuse("m is in use by another process", "train_kenlm", *again)
    training.kill()
    assert training.wait() == -signal.SIGKILL
    assert not output.exists()
    assert run("train_kenlm", *again)[0] == 0
    assert sorted(path.name for path in output.parent.iterdir()) == ["m", "m.json"]
