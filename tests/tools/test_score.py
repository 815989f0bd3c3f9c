"""The command line that scores: right values, resumed after a kill, the same from any number of workers."""

import gzip
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megacpt.data.scores import normalize
from megacpt.data.scores.kenlm_model import PerplexityScorer
from megacpt.data.scores.normalize import Normalization, normalizer
from megacpt.data.tokens.indexed import IndexedDataset, write_dataset
from tests.tools.conftest import TEXTS, Run

ROOT = Path(__file__).resolve().parents[2]
Refuse = Callable[..., None]


def values(path: Path) -> np.ndarray:
    return np.load(path) if path.suffix == ".npy" else np.fromfile(path, dtype="<f4")


def manifest(path: Path) -> dict:
    return json.loads(Path(f"{path}.json").read_text())


def test_perplexities_are_those_of_kenlm(small: Path, tmp_path: Path, run: Run) -> None:
    import kenlm

    output = tmp_path / "scores"
    code, out, err = run(
        "score", "--input", small / "corpus.jsonl", "--model", small / "model.arpa", "--output", output
    )
    assert code == 0, err
    assert "(2 without a word) scored by kenlm, lower is better; quartiles" in out
    model, normalized = kenlm.Model(str(small / "model.arpa")), normalizer(Normalization())
    found = values(output)
    assert len(found) == len(IndexedDataset(small / "data_text_document")) == len(TEXTS) + 3
    for text, score in zip(TEXTS, found.tolist(), strict=False):
        lines = [line.decode() for line in normalized([text])[0].lines]
        total = sum(model.score(line) for line in lines)
        assert score == pytest.approx(10 ** (-total / sum(len(line.split()) + 1 for line in lines)), rel=1e-6)
        if len(lines) == 1:
            assert score == pytest.approx(model.perplexity(lines[0]), rel=1e-6)
    assert np.isinf(found[-3:-1]).all()
    assert found[-1] == found[3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores", "scores.json"]
    written = manifest(output)
    assert (written["documents"], written["unscored"]) == (len(found), 2)
    assert written["direction"] == "lower_is_better"


def test_a_single_line_has_kenlms_perplexity(small: Path, tmp_path: Path, run: Run) -> None:
    import kenlm

    lines = ["the import statement", "zzz unheard", "A CLASS, defined 12 times", "x"]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    run("score", "--input", tmp_path / "c.jsonl", "--model", small / "model.arpa", "--output", tmp_path / "s.npy")
    model = kenlm.Model(str(small / "model.arpa"))
    normalized = [line.lower().replace("12", "00") for line in lines]
    assert values(tmp_path / "s.npy").tolist() == pytest.approx([model.perplexity(x) for x in normalized], rel=1e-6)


def test_a_long_document_is_scored_in_pieces(small: Path) -> None:
    texts = ["one line", "\n".join(TEXTS[:40]), "", "\n\n", "x\n" * 30]
    scorer = PerplexityScorer(small / "model.arpa", Normalization())
    whole = scorer.score(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalize, "LONG", 50)
        assert scorer.score(texts).tolist() == pytest.approx(whole.tolist(), rel=1e-6)


@pytest.mark.parametrize("scorer", ["kenlm", "dsir", "column:quality"])
def test_workers_and_formats_give_the_same_scores(small: Path, tmp_path: Path, run: Run, scorer: str) -> None:
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress((small / "corpus.jsonl").read_bytes() * 3))
    plain = tmp_path / "corpus.jsonl"
    plain.write_bytes((small / "corpus.jsonl").read_bytes() * 3)
    options = ["--scorer", scorer, "--model", small / "model.arpa", "--reference", small / "reference.jsonl"]
    options += ["--dedup", "exact"]
    for name, corpus, workers in (("one", plain, 1), ("two", packed, 2)):
        code, _, err = run("score", "--input", corpus, "--output", tmp_path / name, "--workers", workers, *options)
        assert code == 0, err
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert manifest(tmp_path / "one")["dropped"] == {"duplicates": 2 * (len(TEXTS) + 3) + 1}
    assert len(values(tmp_path / "one")) == len(TEXTS) + 2
    if scorer.startswith("column"):
        assert values(tmp_path / "one")[:9].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 0.5, 1.5]


def test_rows_are_filtered_as_in_preprocessing(small: Path, tmp_path: Path, run: Run) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_bytes((small / "corpus.jsonl").read_bytes() + b"{bad\n" + (small / "corpus.jsonl").read_bytes())
    rows = ["--skip-invalid", "--min-chars", "200", "--dedup", "exact"]
    encode = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", small / "tokenizer.model"]
    assert run("preprocess", "--input", corpus, "--output-prefix", tmp_path / "d", *encode, *rows)[0] == 0
    base = ["--input", corpus, "--model", small / "model.arpa"]
    assert run("score", *base, *rows, "--output", tmp_path / "s")[0] == 0
    assert len(values(tmp_path / "s")) == len(IndexedDataset(tmp_path / "d_text_document"))
    select = ["--data", tmp_path / "d_text_document", "--tokens", "1K", "--order", "lowest"]
    assert run("select_subset", *select, "--scores", tmp_path / "s", "--output", tmp_path / "subset")[0] == 0
    assert run("score", *base, "--skip-invalid", "--output", tmp_path / "all")[0] == 0
    code, _, err = run("select_subset", *select, "--scores", tmp_path / "all", "--output", tmp_path / "no")
    assert code == 2
    assert "scored rows filtered by skip_invalid=True, min_chars=0, dedup=none" in err


def test_a_token_dataset_is_decoded(small: Path, tmp_path: Path, run: Run) -> None:
    base = ["--model", small / "model.arpa", "--output"]
    data = ["--data", small / "data_text_document", "--tokenizer-model", small / "tokenizer.model"]
    assert run("score", "--input", small / "corpus.jsonl", *base, tmp_path / "text")[0] == 0
    assert run("score", *data, *base, tmp_path / "tokens", "--workers", 2)[0] == 0
    text, tokens = values(tmp_path / "text"), values(tmp_path / "tokens")
    # This tokenizer's normalisation drops line feeds, so the texts are other ones, but hardly so.
    assert len(text) == len(tokens)
    assert np.isinf(tokens[-3])
    assert np.corrcoef(np.log(text[:-3]), np.log(tokens[:-3]))[0, 1] > 0.9
    # The dataset says where its tokenizer is.
    assert run("score", *data[:2], *base, tmp_path / "found")[0] == 0
    assert (tmp_path / "found").read_bytes() == (tmp_path / "tokens").read_bytes()
    assert (
        run("score", *data, "--scorer", "dsir", "--reference", small / "reference.jsonl", *base, tmp_path / "d")[0] == 0
    )


def test_a_tokenizer_that_is_no_longer_where_it_was(small: Path, tmp_path: Path, run: Run, refuse: Refuse) -> None:
    shutil.copy(small / "tokenizer.model", tmp_path / "t.model")
    encode = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tmp_path / "t.model"]
    assert run("preprocess", "--input", small / "corpus.jsonl", "--output-prefix", tmp_path / "d", *encode)[0] == 0
    given = ["--data", tmp_path / "d_text_document", "--model", small / "model.arpa", "--output", tmp_path / "s"]
    (tmp_path / "t.model").rename(tmp_path / "moved.model")
    refuse(f"its tokenizer is no longer at {tmp_path.resolve() / 't.model'}; say where it is", "score", *given)
    made = tmp_path / "d_text_document.json"
    record = {name: value for name, value in json.loads(made.read_text()).items() if name != "tokenizer_model"}
    made.write_text(json.dumps(record))
    refuse("nothing says where the tokenizer that made it lies; give --tokenizer-model", "score", *given)
    assert run("score", *given, "--tokenizer-model", tmp_path / "moved.model")[0] == 0


def test_a_token_dataset_of_another_tool(small: Path, tmp_path: Path, run: Run, refuse: Refuse) -> None:
    for suffix in ("bin", "idx"):
        shutil.copy(small / f"data_text_document.{suffix}", tmp_path / f"bare.{suffix}")
    base = ["--tokenizer-model", small / "tokenizer.model", "--model", small / "model.arpa", "--output"]
    bare, kind = ["--data", tmp_path / "bare", *base, tmp_path / "bare.scores"], "SentencePieceTokenizer"
    refuse(
        "bare.json: without a manifest nothing says of which kind its tokenizer is; say it with --tok", "score", *bare
    )
    refuse("not a SentencePiece model", "score", *bare[:3], small / "corpus.jsonl", *bare[4:], "--tokenizer-type", kind)
    code, _, err = run("score", *bare, "--tokenizer-type", kind)
    assert code == 0, err
    assert run("score", "--data", small / "data_text_document", *base, tmp_path / "full.scores")[0] == 0
    assert (tmp_path / "bare.scores").read_bytes() == (tmp_path / "full.scores").read_bytes()
    chosen = ["--tokens", "1K", "--order", "lowest", "--output", tmp_path / "subset"]
    assert run("select_subset", "--data", tmp_path / "bare", "--scores", tmp_path / "bare.scores", *chosen)[0] == 0
    other = ["--data", small / "data_text_document", *base, tmp_path / "s", "--tokenizer-type", "HuggingFaceTokenizer"]
    refuse("was made with a SentencePieceTokenizer", "score", *other)


def test_a_packed_model(small: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "m.arpa.gz").write_bytes(gzip.compress((small / "model.arpa").read_bytes()))
    given = ["--input", small / "corpus.jsonl", "--model", tmp_path / "m.arpa.gz", "--normalization", "ccnet"]
    code, _, err = run("score", *given, "--output", tmp_path / "s")
    # KenLM reads it where it was built with zlib.
    told = "error: " + str(tmp_path / "m.arpa.gz") + ": KenLM cannot load this model as it is packed; unpack it\n"
    assert (code, err) in ((0, ""), (2, told))


def test_tokens_that_a_tokenizer_does_not_have(small: Path, tmp_path: Path, refuse: Refuse) -> None:
    write_dataset(tmp_path / "data", np.dtype(np.uint16), [np.array([5, 6]), np.array([7, 400])])
    given = ["--data", tmp_path / "data", "--tokenizer-type", "SentencePieceTokenizer", "--output", tmp_path / "s"]
    given += ["--tokenizer-model", small / "tokenizer.model", "--model", small / "model.arpa"]
    refuse("document 1 holds token 400, but", "score", *given)
    assert not list(tmp_path.glob("s*"))


def test_kill_9_and_again(small: Path, tmp_path: Path, run: Run) -> None:
    corpus = tmp_path / "big.jsonl"
    corpus.write_bytes((small / "corpus.jsonl").read_bytes() * 40)
    base = ["--input", corpus, "--model", small / "model.arpa", "--output"]
    line = [sys.executable, ROOT / "tools" / "score.py", *base, tmp_path / "killed", "--workers", "2"]
    process = subprocess.Popen(line, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    journal = tmp_path / ".killed.work" / "journal.jsonl"
    end = time.monotonic() + 60
    while not journal.exists() or journal.read_text().count("\n") < 5:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    with open(tmp_path / ".killed.work" / "scores", "ab") as handle:
        handle.write(b"cut")
    with open(journal, "a") as handle:
        handle.write('[17, {"dup')
    assert run("score", *base, tmp_path / "killed")[0] == 0
    assert run("score", *base, tmp_path / "whole")[0] == 0
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert manifest(tmp_path / "killed") == manifest(tmp_path / "whole")
    assert not (tmp_path / ".killed.work").exists()


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray_gives_the_same_scores(small: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster that runs here and that nothing names; in a folder of its own, for other tests have clusters too."""
    from ray.cluster_utils import Cluster

    base = ["--input", small / "corpus.jsonl", "--model", small / "model.arpa", "--output"]
    assert run("score", *base, tmp_path / "one")[0] == 0
    # Short, for the names of sockets in it are limited.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as place:
        monkeypatch.setenv("RAY_TMPDIR", place)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        try:
            code, _, err = run("score", *base, tmp_path / "ray", "--engine", "ray", "--workers", 2)
        finally:
            cluster.shutdown()
    assert code == 0, err
    assert (tmp_path / "one").read_bytes() == (tmp_path / "ray").read_bytes()


@pytest.mark.parametrize("rows", ['{"text": " "}\n', '{"text": "a", "q": -100000}\n' * 3])
def test_a_plot_of_no_score_or_of_one(tmp_path: Path, small: Path, run: Run, rows: str) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "c.jsonl").write_text(rows)
    scorer = ["--scorer", "column:q"] if '"q"' in rows else ["--model", small / "model.arpa"]
    base = ["--input", tmp_path / "c.jsonl", "--output", tmp_path / "s", "--plot", tmp_path / "s.png"]
    assert run("score", *base, *scorer)[0] == 0
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"


def test_a_plot_that_cannot_be_drawn_is_refused_first(
    small: Path, tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    base = ["--input", small / "corpus.jsonl", "--model", small / "model.arpa", "--output", tmp_path / "s"]
    refuse("--plot: matplotlib is not installed", "score", *base, "--plot", tmp_path / "s.png")
    assert not list(tmp_path.iterdir())


def test_a_plot(small: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("matplotlib")
    base = ["--input", small / "corpus.jsonl", "--model", small / "model.arpa", "--output", tmp_path / "s"]
    assert run("score", *base, "--plot", tmp_path / "s.png")[0] == 0
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("no file matches", ["--input", "nowhere.jsonl", "--model", "model.arpa"]),
        ("needs --model", ["--input", "corpus.jsonl"]),
        ("no such model", ["--input", "corpus.jsonl", "--model", "gone"]),
        ("KenLM cannot load this model", ["--input", "corpus.jsonl", "--model", "junk", "--normalization", "ccnet"]),
        ("without bare.json nothing says how", ["--input", "corpus.jsonl", "--model", "bare"]),
        ("not the model that edited.json describes", ["--input", "corpus.jsonl", "--model", "edited"]),
        ("overlap.json: not the record of a KenLM model ('o", ["--input", "corpus.jsonl", "--model", "overlap"]),
        ("was trained on text", ["--input", "corpus.jsonl", "--model", "model.arpa", "--normalization", "lowercase"]),
        ("--normalization up: 'up' is not", ["--input", "corpus.jsonl", "--model", "bare", "--normalization", "up"]),
        ("needs --reference", ["--input", "corpus.jsonl", "--scorer", "dsir"]),
        ("no file matches", ["--input", "corpus.jsonl", "--scorer", "dsir", "--reference", "gone.jsonl"]),
        ("--scorer bleu: unknown", ["--input", "corpus.jsonl", "--scorer", "bleu"]),
        ("corpus.jsonl:1: has no number under 'stars'", ["--input", "corpus.jsonl", "--scorer", "column:stars"]),
        ("nan.jsonl:2: the value of 'q' is no finite", ["--input", "nan.jsonl", "--scorer", "column:q"]),
        ("no finite number but 'a'", ["--input", "nan.jsonl", "--scorer", "column:text"]),
        ("--workers 0", ["--input", "corpus.jsonl", "--model", "model.arpa", "--workers", "0"]),
        ("gone.idx: no such file", ["--data", "gone", "--model", "model.arpa", "--tokenizer-model", "tokenizer.model"]),
        (
            "--eval-set is of --scorer dsir",
            ["--input", "corpus.jsonl", "--model", "model.arpa", "--eval-set", "corpus.jsonl"],
        ),
        (
            "not the tokenizer of",
            ["--data", "data_text_document", "--model", "model.arpa", "--tokenizer-model", "other.model"],
        ),
        ("bad.jsonl:2: invalid JSON", ["--input", "bad.jsonl", "--model", "model.arpa"]),
        ("bad.jsonl:2: invalid JSON", ["--input", "bad.jsonl", "--model", "model.arpa", "--workers", "2"]),
        ("holds no document to score", ["--input", "empty.jsonl", "--model", "model.arpa"]),
    ],
)
def test_bad_commands(small: Path, tmp_path: Path, refuse: Refuse, words: str, options: list[str]) -> None:
    prepare_mistakes(small, tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    named = {"--input", "--model", "--data", "--tokenizer-model", "--reference"}
    pairs = zip(options[::2], options[1::2], strict=True)
    placed = [part for key, value in pairs for part in (key, tmp_path / value if key in named else value)]
    refuse(words, "score", *placed, "--output", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "output", "options"),
    [
        ("corpus.jsonl: is read by this command", "corpus.jsonl", ["--input", "corpus.jsonl"]),
        ("model.arpa: is read by this command", "model.arpa", ["--input", "corpus.jsonl"]),
        ("model.arpa.json: is read by this command", "model.arpa.json", ["--input", "corpus.jsonl"]),
        (
            "data_text_document.json: is read by this command",
            "data_text_document",
            ["--data", "data_text_document", "--tokenizer-model", "tokenizer.model"],
        ),
        (
            "reference.jsonl: is read by this command",
            "reference.jsonl",
            ["--input", "corpus.jsonl", "--scorer", "dsir", "--reference", "reference.jsonl"],
        ),
        ("corpus.jsonl: is read by this command", "out", ["--input", "corpus.jsonl", "--plot", "corpus.jsonl"]),
        ("out: would be written twice", "out", ["--input", "corpus.jsonl", "--plot", "out"]),
        ("folder: is a folder", "folder", ["--input", "corpus.jsonl"]),
    ],
)
def test_what_is_read_is_not_replaced(
    small: Path, tmp_path: Path, refuse: Refuse, words: str, output: str, options: list[str]
) -> None:
    prepare_mistakes(small, tmp_path)
    (tmp_path / "folder").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    named = [option if option.startswith("--") or option == "dsir" else tmp_path / option for option in options]
    model = [] if "dsir" in options else ["--model", tmp_path / "model.arpa"]
    refuse(words, "score", *named, *model, "--output", tmp_path / output, "--overwrite")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def prepare_mistakes(small: Path, folder: Path) -> None:
    for path in small.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    (folder / "junk").write_text("no model\n")
    shutil.copy(small / "model.arpa", folder / "bare")
    (folder / "edited").write_bytes((small / "model.arpa").read_bytes() + b"\n")
    shutil.copy(small / "model.arpa.json", folder / "edited.json")
    shutil.copy(small / "model.arpa", folder / "overlap")
    record = json.loads((small / "model.arpa.json").read_text())
    (folder / "overlap.json").write_text(json.dumps(record | {"overlap": "none"}))
    (folder / "nan.jsonl").write_text('{"text": "a", "q": 1}\n{"text": "b", "q": NaN}\n')
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{bad\n')
    (folder / "empty.jsonl").write_text("\n")
    import sentencepiece

    with open(folder / "other.model", "wb") as handle:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS[:5]), model_writer=handle, vocab_size=380, byte_fallback=True, minloglevel=2
        )


def test_existing_scores_stay(small: Path, tmp_path: Path, run: Run, refuse: Refuse) -> None:
    base = ["--input", small / "corpus.jsonl", "--model", small / "model.arpa", "--output", tmp_path / "s"]
    assert run("score", *base)[0] == 0
    refuse("exists already; pass --overwrite", "score", *base)
    assert run("score", *base, "--overwrite")[0] == 0
