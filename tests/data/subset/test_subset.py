"""The file of a subset, and what its reader refuses."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.subset import subset as file
from megacpt.data.subset.select_run import SelectJob, select
from megacpt.data.subset.subset import SubsetManifest, open_subset, sha256_of_ids, write_subset
from megacpt.data.tokens.indexed import IndexedDataset
from megacpt.errors import UserError

Corpus = Callable[[Sequence[int]], IndexedDataset]
LENGTHS = [5, 0, 3, 7, 1, 4]


def written(path: Path, dataset: IndexedDataset, ids: Sequence[int]) -> Path:
    """A subset file of these ids, whatever they are, with the manifest that a right one would have."""
    array = np.array(ids, dtype=np.int64)
    inside = array[(array >= 0) & (array < len(dataset))]
    manifest = SubsetManifest(
        documents=len(array),
        tokens=int(dataset.lengths[inside].sum()),
        order="lowest",
        seed=None,
        threshold=2.0,
        best=1.0,
        dropped={},
        scores=None,
        dataset={"digest": dataset.digest(), "documents": len(dataset), "tokens": dataset.tokens},
        sha256=sha256_of_ids(array),
        megacpt_version="0",
    )
    write_subset(path, array, manifest)
    return path


@pytest.mark.parametrize("name", ["s", "s.npy", "s.ids"])
def test_ids_come_back(tmp_path: Path, corpus: Corpus, name: str) -> None:
    dataset = corpus(LENGTHS)
    found = open_subset(written(tmp_path / name, dataset, [3, 0, 5]), dataset)
    assert found.ids.tolist() == [3, 0, 5]
    assert found.ids.dtype == np.int64
    assert isinstance(found.ids, np.memmap)
    assert found.tokens == 16
    assert found.manifest.threshold == 2.0
    if not name.endswith(".npy"):
        assert (tmp_path / name).read_bytes() == np.array([3, 0, 5], dtype="<i8").tobytes()


@pytest.mark.parametrize(("tokens", "ids", "held"), [(1, [3], 7), (7, [3], 7), (8, [3, 0], 12), (16, [3, 0, 5], 16)])
def test_a_prefix(tmp_path: Path, corpus: Corpus, tokens: int, ids: list[int], held: int) -> None:
    dataset = corpus(LENGTHS)
    found = open_subset(written(tmp_path / "s", dataset, [3, 0, 5]), dataset, tokens)
    assert (found.ids.tolist(), found.tokens) == (ids, held)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30).filter(any), st.integers(0, 9), st.data())
def test_smaller_budgets_are_prefixes(
    tmp_path_factory: pytest.TempPathFactory, corpus: Corpus, lengths: list[int], seed: int, data: st.DataObject
) -> None:
    dataset, folder = corpus(lengths), tmp_path_factory.mktemp("subsets")
    large = data.draw(st.integers(1, dataset.tokens))
    small = data.draw(st.integers(1, large))
    for name, tokens in (("large", large), ("small", small)):
        select(SelectJob(str(dataset.prefix), tokens, "random", folder / name, seed=seed))
    prefix = open_subset(folder / "large", dataset, small)
    alone = open_subset(folder / "small", dataset)
    assert prefix.ids.tolist() == alone.ids.tolist()
    assert prefix.tokens == alone.tokens >= small
    assert 0 not in dataset.lengths[alone.ids]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([3, 6], "entry 1 is document 6, but the dataset has 6"),
        ([-1, 3], "entry 0 is document -1, but the dataset has 6"),
        ([3, 0, 3], "entry 2 repeats document 3"),
        ([0, 0], "entry 1 repeats document 0"),
    ],
)
@pytest.mark.parametrize("at_once", [2, 1 << 20])
def test_bad_ids(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, ids: list[int], words: str, at_once: int
) -> None:
    monkeypatch.setattr(file, "AT_ONCE", at_once)
    dataset = corpus(LENGTHS)
    with pytest.raises(UserError, match=words):
        open_subset(written(tmp_path / "s", dataset, ids), dataset)


@pytest.mark.parametrize("at_once", [1, 2, 1 << 20])
def test_ids_are_read_in_parts(tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(file, "AT_ONCE", at_once)
    dataset = corpus(LENGTHS)
    found = open_subset(written(tmp_path / "s", dataset, [3, 0, 5]), dataset, 12)
    assert (found.ids.tolist(), found.tokens) == ([3, 0], 12)


def test_what_else_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    dataset, other = corpus(LENGTHS), corpus([*LENGTHS, 1])
    path = written(tmp_path / "s", dataset, [3, 0, 5])

    def refused(words: str, against: IndexedDataset = dataset, tokens: int | None = None) -> None:
        with pytest.raises(UserError, match=re.escape(words)):
            open_subset(path, against, tokens)

    refused("a subset of another corpus", other)
    refused("17 tokens cannot be taken of a subset that holds 16", tokens=17)
    refused("0 tokens cannot be taken", tokens=0)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    refused("are no whole number of int64 values")
    path.write_bytes(content[:-8])
    refused("2 documents of 12 tokens, but s.json says 3 of 16")
    path.write_bytes(content[8:16] + content[:8] + content[16:])
    refused("not the ranking that s.json describes", tokens=1)
    path.unlink()
    refused("no such file of document numbers")
    path.write_bytes(content)
    manifest = tmp_path / "s.json"
    kept = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**kept, "format": "something else"}))
    refused("not a manifest of a subset")
    manifest.write_text("{")
    refused("not a manifest of a subset")
    for field, value in [("tokens", "16"), ("documents", True), ("dataset", "x"), ("dataset", {}), ("sha256", None)]:
        manifest.write_text(json.dumps({**kept, field: value}))
        refused(f"not a manifest of a subset ('{field}' ")
    manifest.unlink()
    refused("s.json: no such file")
    assert asdict(replace(file.SubsetManifest(**kept))) == kept
