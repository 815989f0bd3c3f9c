import hashlib
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.keyed import bijection, permutation, seeded_key, splitmix64
from megacpt.data.mixture import order
from megacpt.data.mixture.order import BUCKET, STORED, PassOrder, deal, samples_per_pass, shuffled_pass

MASK = (1 << 64) - 1
ORDER_OF_10 = [5, 4, 8, 3, 2, 0, 1, 9, 6, 7]
ORDER_OF_20_000 = "6c8428c7444aa44f"
BIJECTION_OF_10 = [3, 2, 8, 1, 9, 7, 4, 5, 6, 0]
LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=200).map(lambda x: np.array(x, dtype=np.int64))


WAYS = pytest.mark.parametrize("stored", [0, STORED], ids=["dealt", "stored"])
"""Both ways, whatever the number of documents."""


def order_of(size: int, key: int, stored: int = STORED) -> list[int]:
    with patch.object(order, "STORED", stored):
        return PassOrder(np.ones(size, np.int32), key).documents.tolist()


def generator(seed: int, outputs: int) -> list[int]:
    """The published generator, one output at a time."""
    result = []
    for _ in range(outputs):
        seed = (seed + 0x9E3779B97F4A7C15) & MASK
        z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        result.append(z ^ (z >> 31))
    return result


def test_oracle_gives_the_published_first_outputs():
    assert generator(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(0, MASK), st.integers(0, 200))
def test_permutation_sorts_by_splitmix64(key: int, size: int):
    outputs = generator(key, size)
    assert splitmix64(key, size).tolist() == outputs
    assert permutation(key, size).tolist() == sorted(range(size), key=outputs.__getitem__)


def test_orders_stay_what_they_were():
    """A changed order would silently spoil every run that resumes: raise mixture.ALGORITHM with it."""
    key = seeded_key("pass", 1234, "medical", 0)
    assert key == 14541693027787072849
    assert order_of(10, key) == ORDER_OF_10
    assert hashlib.sha256(str(order_of(20_000, key)).encode()).hexdigest()[:16] == ORDER_OF_20_000
    assert [bijection(key, 10, index) for index in range(10)] == BIJECTION_OF_10


@WAYS
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_every_document_is_as_likely_in_every_place(size: int, stored: int):
    """Chi-square of the (document, place) counts over seeds stays within six deviations of its expectation."""
    seeds = 3000
    counts = np.zeros((size, size))
    for seed in range(seeds):
        counts[order_of(size, seeded_key("pass", seed, "x", 0), stored), np.arange(size)] += 1
    chi_square = ((counts - seeds / size) ** 2 / (seeds / size)).sum()
    freedom = (size - 1) ** 2
    assert chi_square < freedom + 6 * (2 * freedom) ** 0.5 + 10


def test_all_orders_of_four_documents_are_as_likely():
    seeds = 4800
    orders = [tuple(order_of(4, seeded_key("pass", seed, "x", 0))) for seed in range(seeds)]
    counts = np.array([orders.count(one) for one in set(orders)])
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 23 + 6 * 46**0.5


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 127, 128, 129, 200, 1000, 4097, STORED, STORED + 1, 20_001])
def test_every_document_comes_once_whatever_the_size(size: int):
    for key in (0, 1, MASK):
        assert sorted(order_of(size, key)) == list(range(size))


@given(st.integers(0, MASK), st.integers(1, 5000))
def test_a_deal_and_its_inverse_agree(key: int, documents: int):
    dealt = deal(key, documents)
    places = dealt.buckets_of(np.arange(dealt.buckets)).reshape(-1)[:documents]
    for bucket in (0, dealt.buckets // 2, dealt.buckets - 1):
        expected = np.flatnonzero(places == bucket).tolist()
        assert sorted(dealt.content(bucket).tolist()) == expected
        assert sorted(dealt.members(np.array([bucket])).tolist()) == expected
    assert np.bincount(places, minlength=dealt.buckets).max() <= BUCKET


@given(st.integers(0, MASK), st.integers(1, 400))
def test_a_computed_bijection_is_one(key: int, size: int):
    assert sorted(bijection(key, size, index) for index in range(size)) == list(range(size))


def chi_square(counts: np.ndarray) -> float:
    """Deviations of the sum of squares from its expectation, in its standard deviations, for equal cells."""
    expected, freedom = counts.mean(), counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@WAYS
def test_documents_of_a_sorted_corpus_spread_over_the_whole_pass(stored: int):
    """Where a document lies in the corpus says nothing of where it comes in a pass, over seeds and within one."""
    size, seeds, cells = 5000, 200, 20
    over_seeds, within = np.zeros((cells, cells)), []
    for seed in range(seeds):
        place = np.argsort(order_of(size, seeded_key("pass", seed, "x", 0), stored))
        table = np.histogram2d(np.arange(size), place, bins=cells, range=[[0, size], [0, size]])[0]
        over_seeds += table
        within.append(chi_square(table))
    assert abs(chi_square(over_seeds)) < 5
    # Both too far from and too near to equal counts would be seen; rows and columns are fixed sums.
    expected = ((cells - 1) ** 2 - (cells**2 - 1)) / (2 * (cells**2 - 1)) ** 0.5
    assert abs(np.mean(within) - expected) < 0.5


@WAYS
def test_one_place_gets_every_document_and_one_document_every_place(stored: int):
    size, seeds = 300, 6000
    orders = np.array([order_of(size, seeded_key("pass", seed, "x", 0), stored) for seed in range(seeds)])
    for place in (0, 63, 64, 299):
        assert abs(chi_square(np.bincount(orders[:, place], minlength=size).astype(float))) < 5
    where = np.argsort(orders, axis=1)
    for document in (0, 1, 64, 299):
        assert abs(chi_square(np.bincount(where[:, document], minlength=size).astype(float))) < 5


@pytest.mark.parametrize("size", [200, 300, 1000, STORED, STORED + 1])
def test_documents_at_any_distance_are_as_far_apart_as_by_chance(size: int):
    """The mean distance of two places of n is (n + 1) / 3; that of documents k apart is within 5 standard errors."""
    places = [np.argsort(order_of(size, seed)) for seed in range(400 if size < 2000 else 20)]
    for k in (1, 2, 63, 64, 65, 128):
        means = np.array([np.abs(place[k:] - place[:-k]).mean() for place in places])
        assert abs(means.mean() - (size + 1) / 3) < 5 * means.std() / len(means) ** 0.5


@pytest.mark.parametrize("size", [2000, 20_000])
def test_neighbours_of_one_pass_are_not_neighbours_in_the_next(size: int):
    lengths = np.ones(size, dtype=np.int64)
    passes = [shuffled_pass(lengths, 7, "x", number).documents for number in range(3)]
    identity = np.arange(size)
    for one, other in [(identity, passes[0]), (passes[0], passes[1]), (passes[1], passes[2]), (passes[0], passes[2])]:
        place = np.argsort(other)[one]
        assert (np.abs(np.diff(place)) == 1).sum() < 15
        assert (place == identity).sum() < 10
        assert abs(np.corrcoef(place, identity)[0, 1]) < 5 / size**0.5


def test_documents_of_a_bucket_part_in_the_next_pass():
    """Of the pairs that stand together in one bucket, chance alone brings some together again."""
    size = 64 * 100
    one, other = (np.argsort(order_of(size, seeded_key("pass", 1, "x", n), 0)) // BUCKET for n in range(2))
    together = np.zeros((100, 100))
    np.add.at(together, (one, other), 1)
    again = (together * (together - 1)).sum() / (size * (BUCKET - 1))
    assert 0.005 < again < 0.02


def test_order_depends_on_seed_name_and_pass():
    lengths = np.ones(50, dtype=np.int64)
    orders = [
        shuffled_pass(lengths, *key).documents.tolist() for key in [(1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1)]
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert shuffled_pass(lengths, 1, "a", 0).documents.tolist() == orders[0]


@given(LENGTHS, st.integers(0, 5), st.integers(1, 9), st.sampled_from([0, STORED]))
def test_pieces_cut_the_stream(lengths: np.ndarray, seed: int, size: int, stored: int):
    with patch.object(order, "STORED", stored):
        shuffled = shuffled_pass(lengths, seed, "x", 0)
    stream = [(int(d), t) for d in shuffled.documents for t in range(lengths[d])]
    assert sorted(shuffled.documents) == np.flatnonzero(lengths).tolist()
    for start in range(0, len(stream), size):
        pieces = shuffled.pieces(start, start + size)
        assert [(d, t) for d, first, end in pieces for t in range(first, end)] == stream[start : start + size]
        assert all(first < end for _, first, end in pieces)
        edges = shuffled.edges(start, start + size)
        whole = [int(d) for documents in shuffled.whole(start, start + size) for d in documents if lengths[d]]
        assert sorted([*edges, *((d, 0, int(lengths[d])) for d in whole)]) == sorted(pieces)


@given(st.integers(0, 300), st.integers(1, 20))
def test_samples_per_pass_cover_every_target_once(tokens: int, seq_length: int):
    targets = [
        t
        for r in range(samples_per_pass(tokens, seq_length))
        for t in range(r * seq_length + 1, (r + 1) * seq_length + 1)
    ]
    assert [t for t in targets if t < tokens] == list(range(1, tokens))
