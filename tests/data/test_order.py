import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.order import permutation, samples_per_pass, seeded_key, shuffled_pass, splitmix64

MASK = (1 << 64) - 1
LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=40).map(lambda x: np.array(x, dtype=np.int64))


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
    assert seeded_key("pass", 1234, "medical", 0) == 14541693027787072849
    assert permutation(seeded_key("pass", 1234, "medical", 0), 10).tolist() == [5, 4, 8, 3, 2, 0, 1, 9, 6, 7]


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_every_document_is_as_likely_in_every_place(size: int):
    """Chi-square of the (document, place) counts over seeds stays within six deviations of its expectation."""
    seeds = 3000
    counts = np.zeros((size, size))
    for seed in range(seeds):
        counts[permutation(seeded_key("pass", seed, "x", 0), size), np.arange(size)] += 1
    chi_square = ((counts - seeds / size) ** 2 / (seeds / size)).sum()
    freedom = (size - 1) ** 2
    assert chi_square < freedom + 6 * (2 * freedom) ** 0.5 + 10


def test_all_orders_of_four_documents_are_as_likely():
    seeds = 4800
    orders = [tuple(permutation(seeded_key("pass", seed, "x", 0), 4)) for seed in range(seeds)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 23 + 6 * 46**0.5


def test_neighbours_of_one_pass_are_not_neighbours_in_the_next():
    size, lengths = 2000, np.ones(2000, dtype=np.int64)
    passes = [shuffled_pass(lengths, 7, "x", number).documents for number in range(3)]
    identity = np.arange(size)
    for one, other in [(identity, passes[0]), (passes[0], passes[1]), (passes[1], passes[2])]:
        place = np.argsort(other)[one]
        assert (np.diff(place) == 1).sum() < 10
        assert (place == identity).sum() < 10
        assert abs(np.corrcoef(place, identity)[0, 1]) < 0.1


def test_order_depends_on_seed_name_and_pass():
    lengths = np.ones(50, dtype=np.int64)
    orders = [
        shuffled_pass(lengths, *key).documents.tolist() for key in [(1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1)]
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert shuffled_pass(lengths, 1, "a", 0).documents.tolist() == orders[0]


@given(LENGTHS, st.integers(0, 5), st.integers(1, 9))
def test_pieces_cut_the_stream(lengths: np.ndarray, seed: int, size: int):
    order = shuffled_pass(lengths, seed, "x", 0)
    stream = [(int(d), t) for d in order.documents for t in range(lengths[d])]
    assert sorted(order.documents) == np.flatnonzero(lengths).tolist()
    for start in range(0, len(stream), size):
        pieces = order.pieces(start, start + size)
        assert [(d, t) for d, first, end in pieces for t in range(first, end)] == stream[start : start + size]
        assert all(first < end for _, first, end in pieces)


@given(st.integers(0, 300), st.integers(1, 20))
def test_samples_per_pass_cover_every_target_once(tokens: int, seq_length: int):
    targets = [
        t
        for r in range(samples_per_pass(tokens, seq_length))
        for t in range(r * seq_length + 1, (r + 1) * seq_length + 1)
    ]
    assert [t for t in targets if t < tokens] == list(range(1, tokens))
