"""The command line that selects."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from megacpt.data.scores.scores import read_manifest as read_scores_manifest
from megacpt.data.scores.scores import write_scores
from megacpt.data.subset.subset import open_subset
from megacpt.data.tokens.indexed import IndexedDataset
from megacpt.data.tokens.manifest import read_manifest
from tests.tools.conftest import TEXTS, Run

Refuse = Callable[..., None]


@pytest.fixture(scope="module")
def scored(small: Path, load_tool: Callable) -> Path:
    """The small folder with the file `scores` in it."""
    base = ["--input", small / "corpus.jsonl", "--model", small / "model.arpa", "--output", small / "scores"]
    assert load_tool("score").main([str(part) for part in base]) == 0
    return small


def arguments(folder: Path, output: Path, **options: object) -> list[object]:
    given = {"data": folder / "data_text_document", "scores": folder / "scores", "tokens": "20K", "order": "lowest"}
    given |= {"output": output} | options
    return [
        part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value) if value is not None
    ]


def test_lowest_highest_and_random(scored: Path, tmp_path: Path, run: Run) -> None:
    dataset = IndexedDataset(scored / "data_text_document")
    scores = np.fromfile(scored / "scores", dtype="<f4")
    subsets = {}
    for order in ("lowest", "highest", "random"):
        code, out, err = run("select_subset", *arguments(scored, tmp_path / order, order=order))
        assert code == 0, err
        assert ("warning: --order highest takes the worst documents first" in err) == (order == "highest")
        assert f"of {dataset.tokens:,} tokens, {order}" in out
        subsets[order] = open_subset(tmp_path / order, dataset)
        assert subsets[order].tokens >= 20_000 > subsets[order].tokens - dataset.lengths[subsets[order].ids[-1]]
    low, high = subsets["lowest"], subsets["highest"]
    assert (np.diff(scores[low.ids]) >= 0).all()
    assert (np.diff(scores[high.ids]) <= 0).all()
    assert low.manifest.threshold == scores[low.ids[-1]] < high.manifest.threshold
    assert low.manifest.scores["scorer"]["name"] == "kenlm"
    assert subsets["random"].manifest.scores is None
    assert run("select_subset", *arguments(scored, tmp_path / "again", order="random", scores=None))[0] == 0
    assert (tmp_path / "again").read_bytes() == (tmp_path / "random").read_bytes()


def test_the_tail_is_dropped_first(scored: Path, tmp_path: Path, run: Run) -> None:
    dataset = IndexedDataset(scored / "data_text_document")
    for name, share in (("all", "0%"), ("most", "10%")):
        assert run("select_subset", *arguments(scored, tmp_path / name, drop_tail=share, tokens="50K"))[0] == 0
    whole, most = (open_subset(tmp_path / name, dataset).ids.tolist() for name in ("all", "most"))
    dropped = int(0.1 * (len(TEXTS) + 1))
    assert most[: len(whole) - dropped] == whole[dropped:]
    assert json.loads((tmp_path / "most.json").read_text())["dropped"] == {
        "share": 0.1,
        "tail": dropped,
        "unscored": 1,
        "empty": 1,
    }


def test_a_copy_in_rank_order(scored: Path, tmp_path: Path, run: Run) -> None:
    dataset = IndexedDataset(scored / "data_text_document")
    code, _, err = run("select_subset", *arguments(scored, tmp_path / "s.npy", materialize=tmp_path / "copy"))
    assert (code, err) == (0, "")
    ids, copy = open_subset(tmp_path / "s.npy", dataset).ids, IndexedDataset(tmp_path / "copy")
    assert len(copy) == len(ids)
    for place, document in enumerate(ids.tolist()):
        assert copy.read(place).tolist() == dataset.read(document).tolist()
    manifest = read_manifest(tmp_path / "copy")
    assert (manifest.documents, manifest.tokens, manifest.text_bytes) == (len(copy), copy.tokens, None)
    assert manifest.tokenizer == read_manifest(scored / "data_text_document").tokenizer


def test_overlap_of_the_reference_is_told(scored: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "exam.jsonl").write_text(json.dumps({"q": TEXTS[2][:600]}) + "\n")
    (tmp_path / "other.jsonl").write_text(json.dumps({"q": "?"}) + "\n")
    train = ["--input", scored / "reference.jsonl", "--output", tmp_path / "m", "--trainer", "python", "--order", "2"]
    assert run("train_kenlm", *train, "--eval-set", tmp_path / "exam.jsonl")[0] == 0
    score = ["--input", scored / "corpus.jsonl", "--model", tmp_path / "m", "--output", tmp_path / "scores"]
    assert run("score", *score)[0] == 0
    given = arguments(scored, tmp_path / "s", scores=tmp_path / "scores")
    code, _, err = run("select_subset", *given, "--eval-set", tmp_path / "exam.jsonl", tmp_path / "other.jsonl")
    assert code == 0
    first, second = err.splitlines()
    assert first == (
        "warning: the scorer's reference overlaps exam.jsonl: 1 of 1 items share 13 words in a row: exam.jsonl:1"
    )
    assert second.startswith(
        "warning: the scorer's reference was never compared with other.jsonl; run tools/overlap.py"
    )


def test_a_plot_with_thresholds(scored: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("matplotlib")
    assert run("select_subset", *arguments(scored, tmp_path / "s", drop_tail="5%", plot=tmp_path / "p.png"))[0] == 0
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("--tokens: '5Q' is not a quantity", {"tokens": "5Q"}),
        ("selects nothing", {"tokens": "0"}),
        ("--tokens 1,000,000,000 is more than there is", {"tokens": "1B"}),
        ("(1 without a score, 1 empty); lower --tokens", {"tokens": "1B"}),
        ("--drop-tail: '1.5' is not between 0 and 1", {"drop_tail": "1.5"}),
        ("leaves nothing", {"drop_tail": "100%"}),
        ("needs an order by score", {"drop_tail": "1%", "order": "random"}),
        ("--order lowest needs --scores", {"scores": None}),
        ("--plot draws scores", {"scores": None, "order": "random", "plot": "p.png"}),
        ("which says what gone scores", {"scores": "gone"}),
        ("no such file", {"data": "gone"}),
        ("is the dataset itself", {"materialize": "data_text_document"}),
        ("no such evaluation set", {"eval_set": "gone.jsonl"}),
    ],
)
def test_bad_commands(scored: Path, tmp_path: Path, refuse: Refuse, words: str, options: dict[str, object]) -> None:
    places = {"scores", "data", "materialize", "eval_set", "plot"}
    placed = {key: scored / value if value and key in places else value for key, value in options.items()}
    refuse(words, "select_subset", *arguments(scored, tmp_path / "s", **placed))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "output", "options"),
    [
        ("scores: is read by this command", "scores", {}),
        ("data_text_document.json: is read by this command", "data_text_document", {}),
        ("scores: is read by this command", "s", {"plot": "scores"}),
        ("s.json: would be written twice", "s", {"materialize": "s"}),
        ("s: would be written twice", "s", {"plot": "s"}),
        ("folder: is a folder", "folder", {}),
    ],
)
def test_what_is_read_is_not_replaced(
    scored: Path, tmp_path: Path, refuse: Refuse, words: str, output: str, options: dict[str, str]
) -> None:
    for path in scored.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    (tmp_path / "folder").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    placed = {key: tmp_path / value for key, value in options.items()}
    refuse(words, "select_subset", *arguments(tmp_path, tmp_path / output, **placed), "--overwrite")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a place where no file can be made")
def test_where_no_file_can_be_made(scored: Path, refuse: Refuse) -> None:
    refuse("choose another place", "select_subset", *arguments(scored, Path("/proc/subset")))
    model = ["--input", scored / "corpus.jsonl", "--order", "3", "--output", "/proc/model.binary"]
    refuse("choose another place", "train_kenlm", *model)
    merged = ["--input", scored / "data_text_document", "--output-prefix", "/proc/merged"]
    refuse("choose another place", "merge_datasets", *merged)


def test_scores_that_do_not_belong(scored: Path, tmp_path: Path, run: Run, refuse: Refuse) -> None:
    values, manifest = np.fromfile(scored / "scores", dtype="<f4"), read_scores_manifest(scored / "scores")
    given = arguments(scored, tmp_path / "s", scores=tmp_path / "scores")

    def with_scores(array: np.ndarray, words: str, **changes: object) -> None:
        import hashlib

        sha256 = hashlib.sha256(array.astype("<f4").tobytes()).hexdigest()
        write_scores(tmp_path / "scores", array, replace(manifest, **{"sha256": sha256, **changes}))
        refuse(words, "select_subset", *given)

    with_scores(values[:-1], f"{len(values) - 1} scores, but")
    broken = values.copy()
    broken[7] = np.nan
    with_scores(broken, "the score of document 7 is not a number")
    with_scores(values, "not the scores that scores.json describes", sha256="0" * 64)
    with_scores(values, "scores of other text files", inputs=[{**manifest.inputs[0], "sha256": "0"}])
    with_scores(values, "filtered by skip_invalid=True", filters={**manifest.filters, "skip_invalid": True})
    tokenizer = asdict(read_manifest(scored / "data_text_document").tokenizer)
    dataset = {"digest": "0", "documents": 1, "tokens": 1, "tokenizer": tokenizer}
    with_scores(values, "scores of another dataset", inputs=None, dataset=dataset)
    dataset = {**dataset, "tokenizer": {**tokenizer, "sha256": "1" * 64}}
    with_scores(values, "of another tokenizer (sha256 111111111111)", inputs=None, dataset=dataset)
    for field, value in [
        ("documents", str(len(values))),
        ("direction", "sideways"),
        ("scorer", "kenlm"),
        ("scorer", {}),
        ("scorer", {"name": "kenlm", "overlap": [{"x": 1}]}),
        ("inputs", [{"name": "corpus.jsonl"}]),
        ("dataset", {"digest": "0"}),
        ("filters", ["dedup"]),
    ]:
        (tmp_path / "scores.json").write_text(json.dumps({**asdict(manifest), field: value}))
        refuse(f"not a manifest of scores ('{field}' ", "select_subset", *given)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("s.") or path.name == "s"] == []
    (tmp_path / "scores.json").write_text("[]")
    refuse("not a manifest of scores", "select_subset", *given)
    (tmp_path / "scores.json").unlink()
    refuse("run tools/score.py", "select_subset", *given)
