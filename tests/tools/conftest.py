"""A small corpus of real English, a model of part of it, and the tools of scoring, run in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

import pytest
import sentencepiece

TEXTS = list(dict.fromkeys(text for _, text in sorted(topics.items())))
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(load_tool: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> Run:
    """run(tool, arguments...) -> exit code, stdout, stderr."""

    def call(tool: str, *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = load_tool(tool).main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refuse(run: Run) -> Callable[..., None]:
    """refuse(words, tool, arguments...): the tool exits 2 with one sentence that has these words."""

    def check(words: str, tool: str, *arguments: object) -> None:
        code, out, err = run(tool, *arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        assert words in err

    return check


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, load_tool: Callable[[str], ModuleType]) -> Path:
    """A folder with corpus.jsonl (text, id, quality), reference.jsonl, model.arpa, tokenizer.model and data_*."""
    pytest.importorskip("kenlm")
    folder = tmp_path_factory.mktemp("small")
    texts = [*TEXTS, "", "<s>", TEXTS[3]]
    rows = [{"id": number, "text": text, "quality": 0.5 + number % 7} for number, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reference.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[::2]))
    reference, model = folder / "reference.jsonl", folder / "model.arpa"
    train = ["--input", reference, "--output", model, "--trainer", "python", "--order", "3"]
    assert load_tool("train_kenlm").main([str(part) for part in train]) == 0
    with open(folder / "tokenizer.model", "wb") as handle:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS[:20]), model_writer=handle, vocab_size=400, byte_fallback=True, minloglevel=2
        )
    encode = ["--input", folder / "corpus.jsonl", "--output-prefix", folder / "data", "--append-eod"]
    encode += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", folder / "tokenizer.model"]
    assert load_tool("preprocess").main([str(part) for part in encode]) == 0
    return folder
