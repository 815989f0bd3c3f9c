"""The quickstart's corpora: the real ones, and the ontology's syntax on small cases."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import orjson
import pytest


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("quickstart_data")


OBO = r"""format-version: 1.2

[Term]
id: HP:1
name: Cleft lip
def: "A gap, \"cleft\",\nin the lip." [https://example.org]
comment: Often with a cleft\: palate.
synonym: "Hare lip" EXACT layperson []
synonym: "cleft LIP" EXACT []
synonym: "Cheiloschisis" EXACT []
synonym: "Hare lip" RELATED []
is_a: HP:2 ! Abnormal lip

[Term]
id: HP:2
name: Abnormal lip

[Typedef]
id: part_of
name: part of
"""


def test_a_term_becomes_prose(tool: ModuleType) -> None:
    first, second = tool.obo_terms(OBO.splitlines(keepends=True))
    assert tool.term_text(first) == (
        'Cleft lip\n\nA gap, "cleft",\nin the lip.\n\nOften with a cleft: palate.\n\n'
        "Cleft lip is also called Hare lip and Cheiloschisis.\n\nCleft lip is a kind of Abnormal lip.\n"
    )
    assert tool.term_text(second) == "Abnormal lip\n"


def rows(path: Path) -> list[dict[str, str]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def test_the_real_corpora(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--output-dir", str(tmp_path / "a")]) == 0
    assert tool.main(["--output-dir", str(tmp_path / "b")]) == 0
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    expected = ["general.train", "general.valid", "medical.reference", "medical.train", "medical.valid"]
    assert files == [f"{name}.jsonl" for name in expected]
    assert capsys.readouterr().out.count(" documents, ") == 10
    reference = rows(tmp_path / "a" / "medical.reference.jsonl")
    assert len(reference) > 500
    assert min(len(row["text"].split()) for row in reference) >= 40
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for name, least_words in (("medical", 500_000), ("general", 500_000)):
        train, valid = (rows(tmp_path / "a" / f"{name}.{split}.jsonl") for split in ("train", "valid"))
        identities = [row["id"] for row in train + valid + (reference if name == "medical" else [])]
        assert len(identities) == len(set(identities))
        assert 0.02 < len(valid) / len(identities) < 0.08
        assert sum(len(row["text"].split()) for row in train) > least_words
        assert all(row["text"].strip() and row["source"] for row in train + valid)


def test_without_the_package_one_sentence_says_what_to_do(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert tool.main(["--output-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "make env" in error
    assert list(tmp_path.iterdir()) == []
