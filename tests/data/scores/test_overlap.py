"""Which items of evaluation sets a text contains."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.scores.overlap import EvalOverlap, Evaluation
from megacpt.errors import UserError

WORDS = [f"w{number}" for number in range(40)]


def evaluation(path: Path, items: list[object], text: str, **options: object) -> EvalOverlap:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    found = Evaluation([path], **options)
    found.look_in("something else entirely")
    found.look_in(text)
    (report,) = found.report()
    return report


def test_a_run_of_words_is_found(tmp_path: Path) -> None:
    question = "A 40-year-old man, who smokes, has had a dry cough for three weeks; what next?"
    items = [{"question": question, "answer": "x"}, {"question": "Short?"}, {"question": " ".join(WORDS[:13])}]
    text = f"Intro. {question.upper().replace(',', ' --')} More."
    report = evaluation(tmp_path / "e.jsonl", items, text)
    assert (report.items, report.too_short, report.overlapping) == (3, 1, 1)
    assert report.examples == ["e.jsonl:1"]
    assert report.sentence() == "e.jsonl: 1 of 3 items share 13 words in a row: e.jsonl:1"
    assert evaluation(tmp_path / "e.jsonl", items, text, keys=["answer"]).overlapping == 0


@given(st.lists(st.sampled_from(WORDS[:4]), max_size=20), st.lists(st.sampled_from(WORDS[:4]), max_size=20))
def test_overlap_is_a_common_substring(
    tmp_path_factory: pytest.TempPathFactory, text: list[str], item: list[str]
) -> None:
    runs = [item[start : start + 5] for start in range(len(item) - 4)]
    expected = any(text[start : start + 5] in runs for start in range(len(text) - 4))
    path = tmp_path_factory.mktemp("e") / "e.jsonl"
    assert evaluation(path, [{"q": " ".join(item)}], " ".join(text), ngram=5).overlapping == expected


@pytest.mark.parametrize("form", ["object", "list", "gzip", "nested"])
def test_forms_of_evaluation_sets(tmp_path: Path, form: str) -> None:
    text = " ".join(WORDS)
    whole: object = {"id7": {"CONTEXTS": ["no", text]}} if form in ("object", "gzip") else [[{"deep": {"er": text}}]]
    path = tmp_path / ("e.json.gz" if form == "gzip" else "e.json")
    content = json.dumps(whole, indent=1 if form != "list" else None).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if form == "gzip" else content)
    found = Evaluation([path])
    found.look_in(text)
    (report,) = found.report()
    assert report.overlapping == 1
    assert report.examples == [f"{path.name}:{'id7' if isinstance(whole, dict) else 1}"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.jsonl", None, "cannot be read"),
        ("bad.jsonl", b"{bad\n", "neither JSON nor JSON Lines"),
        ("cut.jsonl.gz", gzip.compress(b"{}" * 100, mtime=0)[:-4], "cannot be read"),
        ("empty.jsonl", b"", "holds no item|neither JSON"),
    ],
)
def test_bad_evaluation_sets(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        Evaluation([tmp_path / name])


def test_too_short_an_ngram(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use at least 5"):
        Evaluation([], ngram=4)
