"""Samples of tokens: of one corpus, of a mixture of corpora, and of a held-out corpus for validation."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Protocol

import numpy as np

from megacpt.data.keyed import bijection, seeded_key
from megacpt.data.mixture.mixture import Mixture
from megacpt.data.mixture.order import PassOrder, samples_per_pass, shuffled_pass
from megacpt.data.subset.subset import open_subset
from megacpt.data.tokens.indexed import IndexedDataset, out_of_vocabulary
from megacpt.errors import UserError

PADDING = 0
"""The token after the end of a pass: never a target, and any token that every vocabulary has will do."""


THREADS = 8
"""Sources that are opened or shuffled at a time at most."""


def for_all[Given, Made](work: Callable[[Given], Made], sources: Iterable[Given]) -> list[Made]:
    """What `work` makes of each source, in order; several at a time, but more threads than cores wait for Python's
    lock."""
    threads = min(THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, thread_name_prefix="source") as pool:
        return list(pool.map(work, sources))


@dataclass(frozen=True, slots=True)
class Sample:
    """seq_length S inputs and their targets, one token on.

    Attributes:
        tokens: int64 [S + 1]; inputs are the first S, targets the last S.
        valid: bool [S], whether the target counts; False on padding.
        segments: int32 [S + 1], which of the sample's documents a token belongs to, from 0; padding is a segment too.
        source: the number of the source in the mixture.
    """

    tokens: np.ndarray
    valid: np.ndarray
    segments: np.ndarray
    source: int


class SampleReader(Protocol):
    """Whatever has a k-th sample."""

    def sample(self, k: int) -> Sample:
        """Sample k, always the same for the same k; safe to call from several threads."""


@dataclass(frozen=True)
class Corpus:
    """The documents of a source: a dataset, or the subset of it that is read.

    Attributes:
        ids: int64 [documents], their numbers in the dataset; None: all of it, as they come.
        lengths: integers [documents], tokens of each.
        tokens: all of them.
        digest: identifies the content wherever it lies.
    """

    dataset: IndexedDataset
    ids: np.ndarray | None
    lengths: np.ndarray
    tokens: int
    digest: str

    @classmethod
    def open(cls, path: str, subset: str | None = None, tokens: int | None = None) -> "Corpus":
        """The dataset with prefix `path`; of it the documents that the file `subset` ranks, down to `tokens`.

        Raises:
            UserError: a file is missing, truncated or foreign, or the subset another corpus's or too small.
        """
        dataset = IndexedDataset(path)
        if subset is None:
            return cls(dataset, None, dataset.lengths, dataset.tokens, dataset.digest())
        ranked = open_subset(subset, dataset, tokens)
        lengths = dataset.lengths[ranked.ids].astype(np.int32)
        digest = hashlib.sha256(f"{dataset.digest()} {len(lengths)}".encode())
        digest.update(np.ascontiguousarray(ranked.ids, dtype="<i8").data)
        return cls(dataset, ranked.ids, lengths, ranked.tokens, digest.hexdigest())

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, place: int) -> int:
        """The number in the dataset of the document in place `place`."""
        return place if self.ids is None else int(self.ids[place])


class SourceStream:
    """One source, shuffled pass after shuffled pass.

    Two passes' orders are kept (12 bytes for 64 documents each), so that reading around the end of a pass does not
    shuffle again and again.

    Args:
        vocab_size: of the model; a token outside is refused when a sample holds it.
    """

    def __init__(self, corpus: Corpus, name: str, seq_length: int, seed: int, vocab_size: int) -> None:
        self.corpus, self.dataset, self.lengths = corpus, corpus.dataset, corpus.lengths
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.samples_per_pass = samples_per_pass(corpus.tokens, seq_length)
        self._shuffled = lru_cache(maxsize=2)(lambda number: shuffled_pass(corpus.lengths, seed, name, number))
        self._lock = Lock()

    def order(self, number: int) -> PassOrder:
        """The order of pass `number`; threads that need it at once shuffle it once."""
        with self._lock:
            return self._shuffled(number)

    def sample(self, number: int, row: int, source: int = 0) -> Sample:
        """Sample `row` of the shuffled pass `number`, labelled `source`.

        Raises:
            UserError: a token is outside the vocabulary; names the file and the document.
        """
        first, size = row * self.seq_length, self.seq_length + 1
        pieces = self.order(number).pieces(first, first + size)
        tokens = np.full(size, PADDING, dtype=np.int64)
        segments = np.full(size, len(pieces), dtype=np.int32)
        end = 0
        for segment, (place, start, stop) in enumerate(pieces):
            begin, end = end, end + stop - start
            tokens[begin:end] = self.dataset.read(self.corpus.document(place), start, stop)
            segments[begin:end] = segment
        valid = np.ones(self.seq_length, dtype=bool)
        valid[end - 1 :] = False
        # Seen as unsigned, a negative token is a huge one: one comparison finds both.
        if int(tokens.view(np.uint64).max()) >= self.vocab_size:
            at = int((tokens.view(np.uint64) >= self.vocab_size).argmax())
            document = self.corpus.document(pieces[segments[at]][0])
            raise out_of_vocabulary(self.dataset.prefix, document, int(tokens[at]), self.vocab_size)
        return Sample(tokens, valid, segments, source)


class BlendedDataset:
    """The samples of a training run: sample k is a pure function of the mixture's sources, its seed and k.

    Args:
        corpora: a corpus for each of the mixture's sources, by name.
    """

    def __init__(self, mixture: Mixture, corpora: Mapping[str, Corpus], vocab_size: int) -> None:
        self.mixture = mixture
        self.streams = [
            SourceStream(corpora[source.name], source.name, mixture.seq_length, mixture.seed, vocab_size)
            for source in mixture.sources
        ]

    def prepare(self, k: int) -> None:
        """Shuffle the passes that global samples from k on begin in, all sources at once, before they are asked for."""
        segment = self.mixture.segment(k)
        taken = segment.taken(k)
        coming = [
            (stream, draw.locate(count)[0])
            for stream, draw, count, samples in zip(self.streams, segment.draws, taken, segment.counts, strict=True)
            if samples
        ]
        for_all(lambda entry: entry[0].order(entry[1]), coming)

    def sample(self, k: int) -> Sample:
        """Global sample k; beyond the end of the mixture the largest source goes on.

        Raises:
            UserError: a token is outside the vocabulary; names the file and the document.
        """
        source, number, row = self.mixture.locate(k)
        return self.streams[source].sample(number, row, source)


class EvalSet:
    """`limit` samples of one seeded pass over a held-out corpus, or all of it: the same through a whole run.

    They are drawn from all of the pass: neighbours in it are of one document where documents are long. A larger limit
    begins with the samples of a smaller one.

    Samples beyond the set are padding without a single target, so that batches of any size can read to its end.

    Raises:
        UserError: the corpus has no target.
    """

    def __init__(self, stream: SourceStream, limit: int | None = None) -> None:
        if not stream.samples_per_pass:
            raise UserError(
                f"{stream.dataset.prefix}: {len(stream.dataset):,} documents with {stream.dataset.tokens:,} tokens are "
                "too few for one sample; check eval.sets"
            )
        self.stream = stream
        self.samples = stream.samples_per_pass if limit is None else min(limit, stream.samples_per_pass)
        self._key = seeded_key("held-out samples")

    def __len__(self) -> int:
        return self.samples

    def sample(self, k: int) -> Sample:
        """Sample k of the set, or padding beyond it.

        Raises:
            UserError: a token is outside the vocabulary; names the file and the document.
        """
        if k < self.samples:
            return self.stream.sample(0, bijection(self._key, self.stream.samples_per_pass, k))
        size = self.stream.seq_length
        return Sample(np.full(size + 1, PADDING, np.int64), np.zeros(size, bool), np.zeros(size + 1, np.int32), 0)
