import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.text import filtering
from megacpt.data.text.documents import Source
from megacpt.data.text.filtering import DigestSet, digests_of, iter_documents, kept_columns
from megacpt.data.text.provenance import Filters
from megacpt.errors import UserError


@given(st.lists(st.lists(st.text(max_size=2), max_size=30), max_size=8))
def test_a_digest_is_new_once(batches):
    seen: set[str] = set()
    digests = DigestSet()
    for texts in batches:
        expected = [not (text in seen or seen.add(text)) for text in texts]
        assert digests.add(digests_of(texts)).tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2**64 - 1])), max_size=60), st.integers(1, 60))
def test_digests_that_want_the_same_slot(pairs, size):
    """Also the digest zero, which is what an empty slot looks like; it counts as one."""
    found = DigestSet()
    whole = np.array([(1, 1) if pair == (0, 0) else pair for pair in pairs], dtype=np.uint64).reshape(-1, 2)
    seen: set[tuple[int, int]] = set()
    for start in range(0, len(whole), size):
        part = whole[start : start + size]
        expected = [not (tuple(row) in seen or seen.add(tuple(row))) for row in part.tolist()]
        assert found.add(part).tolist() == expected


def test_the_table_grows_within_its_bounds():
    digests = DigestSet()
    numbers = np.random.default_rng(0).integers(1, 2**63, (60_000, 2)).astype(np.uint64)
    for start in range(0, len(numbers), 500):
        assert digests.add(numbers[start : start + 500]).all()
        count = start + 500
        assert digests.nbytes <= max(16 << 12, 43 * count)
    assert not digests.add(numbers).any()


def test_documents_are_filtered_in_order(tmp_path):
    rows = [{"q": "same", "a": "1"}, {"q": "é"}, {"q": "é", "a": "2"}, {"q": "ab", "a": "3"}, {"q": "same", "a": "4"}]
    rows += [{"q": "other", "a": "5"}, {"q": "same", "a": "6"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[4:]))
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    counts: Counter[str] = Counter()
    found = list(iter_documents(paths, ["q", "a"], Filters(True, 2, "exact"), counts))
    names = [str(path) for path in paths]
    assert found == [
        (f"{names[0]}:1", ["same", "1"]),
        (f"{names[0]}:4", ["ab", "3"]),
        (f"{names[1]}:2", ["other", "5"]),
    ]
    assert counts == {"missing_key": 1, "too_short": 1, "duplicates": 2}
    assert [texts[1] for _, texts in iter_documents(paths, ["q", "a"], Filters(True))] == list("123456")
    (block,) = Source(paths[0]).blocks(["q", "a"])
    counts.clear()
    assert kept_columns(block, ["q", "a"], Filters(True, 2), counts) == [["same", "ab"], ["1", "3"]]
    assert counts == {"missing_key": 1, "too_short": 1}
    with pytest.raises(UserError, match=r"a\.jsonl:2: has no key 'a'"):
        list(iter_documents(paths, ["q", "a"], Filters()))


def test_growing_goes_piece_by_piece(monkeypatch):
    monkeypatch.setattr(filtering, "AT_ONCE", 100)
    digests = DigestSet()
    numbers = np.arange(1, 20_001, dtype=np.uint64).reshape(-1, 2)
    assert digests.add(numbers).all()
    assert not digests.add(numbers[::-1]).any()
