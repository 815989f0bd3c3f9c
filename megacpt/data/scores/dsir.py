"""DSIR: log importance weights of documents from hashed n-grams (Xie et al. 2023, arXiv 2302.03169).

A document is a bag of unigrams and bigrams, hashed into 10,000 buckets. Two bags-of-buckets models, of the target (the
reference) and of the raw corpus, give its weight: the sum over its n-grams of log p_target - log p_raw. Documents with
high weights look more like the reference than the corpus does. Two things differ from the authors' code: counts are
smoothed by one per bucket, so that an empty one cannot decide alone, and hashes are BLAKE2b, the same on every machine.

With `length_normalized` the weight is the mean over n-grams: quality regardless of length. DSIR proper draws documents
with probabilities from the sums; ranking takes the highest.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256

import numpy as np

from megacpt.data.text.long_string import LongString, chunks_of, cut_at

BUCKETS = 10_000
TOKEN = re.compile(r"\w+|[^\w\s]+")
BLANK = re.compile(r"\s")
LONG = 1 << 21
"""Characters from which a text is worked through in pieces."""
BIGRAM = np.uint64(0x9E3779B97F4A7C15)
MOST_WORDS = 1 << 20


@dataclass(frozen=True)
class DsirModel:
    """log p_target - log p_raw of each bucket, as bytes of float64 [BUCKETS], so that it can be hashed and sent."""

    log_ratios: bytes
    length_normalized: bool

    @property
    def sha256(self) -> str:
        """Tells one model from another."""
        return sha256(self.log_ratios + bytes([self.length_normalized])).hexdigest()


class _TokenHashes(dict[str, int]):
    def __missing__(self, token: str) -> int:
        digest = blake2b(token.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        found = self[token] = int.from_bytes(digest, "little")
        return found


class Buckets:
    """Hashes texts into buckets."""

    def __init__(self) -> None:
        self._known = _TokenHashes()

    def of(self, text: str | LongString) -> Iterator[np.ndarray]:
        """Buckets of a text's unigrams and bigrams, piece by piece: int64 [n], 2 * tokens - 1 in all, or none."""
        last = np.empty(0, dtype=np.uint64)
        for piece in cut_at(chunks_of(text, LONG), _after_a_blank, ""):
            if len(self._known) > MOST_WORDS:
                self._known.clear()
            tokens = TOKEN.findall(piece.lower())
            single = np.fromiter(map(self._known.__getitem__, tokens), dtype=np.uint64, count=len(tokens))
            joined = np.concatenate([last, single])
            pairs = joined[:-1] * BIGRAM + joined[1:]
            pairs ^= pairs >> np.uint64(31)
            last = joined[-1:]
            yield (np.concatenate([single, pairs]) % np.uint64(BUCKETS)).astype(np.int64)


def _after_a_blank(piece: str) -> int:
    """A place where no token goes across."""
    blank = BLANK.search(piece, len(piece) // 2)
    return blank.end() if blank else 0


def bucket_counts(texts: Iterable[str | LongString]) -> np.ndarray:
    """How often each bucket is met: int64 [BUCKETS]."""
    buckets, counts = Buckets(), np.zeros(BUCKETS, dtype=np.int64)
    for text in texts:
        for part in buckets.of(text):
            counts += np.bincount(part, minlength=BUCKETS)
    return counts


def fit(target: np.ndarray, raw: np.ndarray, length_normalized: bool = False) -> DsirModel:
    """The model of two counts of buckets."""
    ratios = np.log((target + 1) / (target.sum() + BUCKETS)) - np.log((raw + 1) / (raw.sum() + BUCKETS))
    return DsirModel(ratios.astype("<f8").tobytes(), length_normalized)


class DsirScorer:
    """Log importance weights of documents; the higher, the more a text is like the reference."""

    def __init__(self, model: DsirModel) -> None:
        self._ratios = np.frombuffer(model.log_ratios, dtype="<f8")
        self._mean, self._buckets = model.length_normalized, Buckets()

    def score(self, texts: Sequence[str | LongString]) -> np.ndarray:
        """float32 [texts]; minus infinity for a text without a token."""
        return np.array([self._weight(text) for text in texts], dtype=np.float32)

    def _weight(self, text: str | LongString) -> float:
        total, count = 0.0, 0
        for part in self._buckets.of(text):
            total, count = total + float(self._ratios[part].sum()), count + len(part)
        if not count:
            return float("-inf")
        return total / count if self._mean else total
