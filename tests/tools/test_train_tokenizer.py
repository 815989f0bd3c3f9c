"""The tokenizer trainer: exact round trips, the same bytes twice, and clear refusals."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import orjson
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

CODE = "def area(r):\n\tif r < 0:\n\t\treturn None\n    return 3.14159 * r ** 2   # spaces  and\ttabs\n\n\n"
PROSE = "Renal cysts are fluid-filled sacs in the kidney. "
ANY_TEXT = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("train_tokenizer")


@pytest.fixture(scope="module")
def processor(tool: ModuleType) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=tool.train([CODE * 3, PROSE * 200 + "\n" + CODE], 400))


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    return path


@given(text=ANY_TEXT | st.text("ab \n\t\r.1"))
@settings(max_examples=300, deadline=None)
def test_every_text_decodes_to_itself(processor: sentencepiece.SentencePieceProcessor, text: str) -> None:
    assert processor.decode(processor.encode(text)) == text


def test_ids_are_llamas_and_newlines_and_tabs_are_pieces(processor: sentencepiece.SentencePieceProcessor) -> None:
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (0, 1, 2, -1)
    assert processor.vocab_size() == 400
    assert all(processor.piece_to_id(piece) > 258 for piece in ("\n", "\t"))
    assert not any(processor.is_byte(piece) for piece in processor.encode("\n\n\tcysts"))


def test_a_document_longer_than_the_trainers_default_is_seen_whole(tool: ModuleType) -> None:
    long = PROSE * 200 + "\n" + "quokka " * 50
    trained = sentencepiece.SentencePieceProcessor(model_proto=tool.train([long, CODE], 400))
    assert len(trained.encode("quokka")) == 1


def test_the_same_input_gives_the_same_bytes(tool: ModuleType, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [CODE, PROSE * 20, "", "  "])
    for name in ("a.model", "b.model"):
        command = ["--input", str(rows), "--vocab-size", "350", "--output", str(tmp_path / name)]
        assert tool.main(command) == 0
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


@given(sizes=st.lists(st.integers(1, 50), max_size=20), most=st.integers(1, 300))
@settings(deadline=None)
def test_a_sample_keeps_the_order_and_the_limit(tool: ModuleType, sizes: list[int], most: int) -> None:
    texts = [f"{number:03d}".ljust(size, "é") for number, size in enumerate(sizes)]
    kept = tool.sample(iter(texts), most)
    assert kept == sorted(kept)
    assert set(kept) <= set(texts)
    assert bool(kept) == bool(texts)
    assert len(kept) < 2 or sum(len(text.encode()) for text in kept) <= most


@pytest.mark.parametrize(
    ("content", "vocabulary", "words"),
    [
        (b'{"text": "a"}\n{"text": \n', "300", ["rows.jsonl:2", "not a JSON object"]),
        (b'{"body": "a"}\n', "300", ["rows.jsonl:1", "'text'", "--json-key"]),
        (b'{"text": 5}\n', "300", ["rows.jsonl:1"]),
        (b"[1]\n", "300", ["rows.jsonl:1"]),
        (b"", "300", ["no text"]),
        (b'{"text": "a b c"}\n', "100", ["--vocab-size 100", "smaller"]),
        (b'{"text": "a b c"}\n', "9999", ["--vocab-size 9999", "too high"]),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    tool: ModuleType,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    content: bytes,
    vocabulary: str,
    words: list[str],
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    target = tmp_path / "out.model"
    command = ["--input", str(tmp_path / "rows.jsonl"), "--vocab-size", vocabulary, "--output", str(target)]
    assert tool.main(command) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not target.exists()


def test_a_missing_file_is_named(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--input", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "out.model")]) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err
