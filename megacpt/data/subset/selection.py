"""Which documents a subset takes: documents ranked, and as many from the top as a budget of tokens needs.

Pure functions of lengths and scores. A subset of a smaller budget is the beginning of that of a larger one, because
the ranking does not depend on the budget.
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megacpt.data.keyed import permutation, seeded_key

ORDERS = ("lowest", "highest", "random")


@dataclass(frozen=True)
class Ranking:
    """Documents that a subset may take, best first: int64 [ranked].

    Attributes:
        dropped_tail: documents left out as the extreme of the chosen end.
        unscored: documents left out because they have no score.
        empty: documents left out because they have no token.
    """

    documents: np.ndarray
    dropped_tail: int
    unscored: int
    empty: int


def rank_by_score(lengths: np.ndarray, scores: np.ndarray, order: str, drop_tail: float = 0.0) -> Ranking:
    """Documents with tokens and a finite score, by score; equal scores by document number.

    Args:
        lengths: int64 [documents], in tokens.
        scores: float32 [documents].
        order: "lowest" or "highest" score first.
        drop_tail: share in [0, 1) of these documents that is left out at the chosen end, rounded down: the extreme of a
            language model's perplexity is boilerplate and repetition rather than the best text.
    """
    finite = np.isfinite(scores)
    candidates = np.flatnonzero((lengths > 0) & finite)
    keys = scores[candidates] if order == "lowest" else -scores[candidates]
    ranked = candidates[np.argsort(keys, kind="stable")]
    # A share such as 0.29 of 100 documents is 29, whatever a float makes of the product.
    dropped = int(Fraction(str(drop_tail)) * len(ranked))
    return Ranking(ranked[dropped:], dropped, int(((lengths > 0) & ~finite).sum()), int((lengths == 0).sum()))


def rank_at_random(lengths: np.ndarray, seed: int) -> Ranking:
    """Documents with tokens in an order that depends on the seed and their numbers alone."""
    documents = permutation(seeded_key("subset", seed), len(lengths))
    return Ranking(documents[lengths[documents] > 0], 0, 0, int((lengths == 0).sum()))


def shortest_prefix(lengths: np.ndarray, tokens: int) -> tuple[int, int]:
    """How many leading documents hold at least `tokens` (all, if they hold fewer), and how many tokens these hold.

    Args:
        lengths: int64 [ranked], tokens of documents in the order of their rank.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    count = min(len(ends), int(np.searchsorted(ends, tokens, side="left")) + 1) if tokens > 0 else 0
    return count, int(ends[count - 1]) if count else 0
