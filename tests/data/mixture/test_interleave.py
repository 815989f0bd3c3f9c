from math import ceil, log2

from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.mixture.interleave import Interleaving

SHARES = st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(any)
SEEDS = st.integers(0, 1000)


def build(shares: list[int], seed: int) -> Interleaving:
    return Interleaving([f"s{i}" for i in range(len(shares))], shares, seed)


@given(SHARES, SEEDS)
def test_exact_counts_every_index_in_turn_and_low_discrepancy(shares: list[int], seed: int):
    interleaving, total, counts = build(shares, seed), sum(shares), [0] * len(shares)
    levels = ceil(log2(len(shares)))
    for k in range(2 * total):
        assert interleaving.counts(k) == counts
        source, index = interleaving.locate(k)
        assert index == counts[source]
        counts[source] += 1
        for count, share in zip(counts, shares, strict=True):
            assert abs(count * total - (k + 1) * share) <= levels * total
        if k + 1 == total:
            assert counts == shares


@given(SHARES, SEEDS)
def test_order_of_declaration_means_nothing(shares: list[int], seed: int):
    names = [f"s{i}" for i in range(len(shares))]
    forward, backward = Interleaving(names, shares, seed), Interleaving(names[::-1], shares[::-1], seed)
    for k in range(sum(shares)):
        (one, i), (other, j) = forward.locate(k), backward.locate(k)
        assert (names[one], i) == (names[::-1][other], j)


def test_seed_moves_the_phase_only():
    sequences = {tuple(build([2, 5], seed).locate(k)[0] for k in range(7)) for seed in range(50)}
    assert len(sequences) == 7
    assert all(sum(sequence) == 5 for sequence in sequences)
