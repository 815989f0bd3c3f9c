"""Rankings and budgets."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.subset.selection import rank_at_random, rank_by_score, shortest_prefix

DOCUMENTS = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from([0.5, 1.0, 1.0, 2.5, np.inf, -np.inf])), min_size=1, max_size=60
)


def arrays(documents: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    lengths, scores = zip(*documents, strict=True)
    return np.array(lengths, dtype=np.int64), np.array(scores, dtype=np.float32)


@given(DOCUMENTS, st.sampled_from(["lowest", "highest"]), st.sampled_from([0.0, 0.01, 0.1, 0.29, 0.9]))
def test_ranking_is_by_score_then_number(documents: list[tuple[int, float]], order: str, share: float) -> None:
    lengths, scores = arrays(documents)
    ranking = rank_by_score(lengths, scores, order, share)
    sign = 1 if order == "lowest" else -1
    eligible = [d for d in range(len(lengths)) if lengths[d] and np.isfinite(scores[d])]
    by_score = sorted(eligible, key=lambda d: (sign * scores[d], d))
    dropped = len(eligible) * round(100 * share) // 100
    assert ranking.documents.tolist() == by_score[dropped:]
    assert ranking.dropped_tail == dropped
    assert len(by_score) + ranking.unscored + ranking.empty == len(lengths)


@given(DOCUMENTS, st.integers(0, 5))
def test_a_random_ranking_holds_every_document_with_tokens(documents: list[tuple[int, float]], seed: int) -> None:
    lengths, _ = arrays(documents)
    ranked = rank_at_random(lengths, seed).documents
    assert sorted(ranked.tolist()) == np.flatnonzero(lengths).tolist()
    assert ranked.tolist() == rank_at_random(lengths, seed).documents.tolist()


def test_seeds_give_other_orders() -> None:
    lengths = np.ones(1000, dtype=np.int64)
    first, second = (rank_at_random(lengths, seed).documents for seed in (1, 2))
    assert (first != second).mean() > 0.99


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(0, 400))
def test_the_prefix_is_the_shortest(lengths: list[int], tokens: int) -> None:
    count, held = shortest_prefix(np.array(lengths, dtype=np.int64), tokens)
    assert held == sum(lengths[:count])
    assert held >= min(tokens, sum(lengths))
    assert count == 0 or held - lengths[count - 1] < tokens
