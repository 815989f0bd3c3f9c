from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megacpt.data.keyed import bijection, seeded_key
from megacpt.data.mixture.mixture import Source
from megacpt.data.mixture.solve import solve
from megacpt.data.samples.blended import BlendedDataset, Corpus, EvalSet, Sample, SourceStream
from megacpt.data.tokens.indexed import IndexedDataset, write_dataset
from megacpt.errors import UserError

Make = Callable[[Sequence[int]], IndexedDataset]
VOCABULARY = 1 << 20
LENGTHS = st.lists(st.one_of(st.integers(0, 2), st.integers(0, 40)), min_size=1, max_size=25).filter(
    lambda x: sum(x) > 1
)
relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def stream_over(dataset: IndexedDataset, seq_length: int, seed: int = 1, vocab_size: int = VOCABULARY) -> SourceStream:
    return SourceStream(Corpus.open(dataset.prefix), "x", seq_length, seed, vocab_size)


def source_of(name: str, corpus: Corpus, **asked: Any) -> Source:
    return Source(name, len(corpus), corpus.tokens, corpus.digest, **asked)


def stream_of(samples: Sequence[Sample]) -> list[int]:
    """The tokens of one pass put together again: its first token, then every target that counts."""
    return [int(samples[0].tokens[0]), *(int(t) for s in samples for t in s.tokens[1:][s.valid])]


def check_pass(dataset: IndexedDataset, samples: Sequence[Sample]) -> list[int]:
    """Every token once, and every document whole; returns the order of the documents."""
    stream = stream_of(samples)
    assert sorted(stream) == list(range(dataset.tokens))
    ends = np.cumsum(dataset.lengths)
    order, at = [], 0
    while at < len(stream):
        document = int(np.searchsorted(ends, stream[at], side="right"))
        tokens = dataset.read(document).tolist()
        assert stream[at : at + len(tokens)] == tokens
        order.append(document)
        at += len(tokens)
    return order


@relaxed
@given(lengths=LENGTHS, seq_length=st.integers(1, 50), seed=st.integers(0, 99))
def test_every_pass_holds_every_document_once(corpus: Make, lengths: list[int], seq_length: int, seed: int):
    dataset = corpus(lengths)
    stream = stream_over(dataset, seq_length, seed)
    n = stream.samples_per_pass
    for number in range(3):
        samples = [stream.sample(number, row) for row in range(n)]
        check_pass(dataset, samples)
        for sample, follower in pairwise(samples):
            assert sample.valid.all()
            assert sample.tokens[-1] == follower.tokens[0]


@pytest.mark.parametrize("seq_length", [64, 1000])
def test_three_epochs_of_a_thousand_documents(corpus: Make, seq_length: int):
    dataset = corpus(np.random.default_rng(0).integers(0, 120, 1000).tolist())
    corpora = {"x": Corpus.open(dataset.prefix)}
    mixture = solve([source_of("x", corpora["x"], epochs=3)], seq_length, 8, 1234)
    blend = BlendedDataset(mixture, corpora, VOCABULARY)
    samples = [blend.sample(k) for k in range(blend.mixture.samples)]
    n = len(samples) // 3
    orders = [check_pass(dataset, samples[number * n : (number + 1) * n]) for number in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == np.flatnonzero(dataset.lengths).tolist() for order in orders)


@relaxed
@given(lengths=LENGTHS, seq_length=st.integers(1, 50))
def test_segments_are_documents_and_padding_has_its_own(corpus: Make, lengths: list[int], seq_length: int):
    dataset = corpus(lengths)
    stream, ends = stream_over(dataset, seq_length), np.cumsum(dataset.lengths)
    for j in range(stream.samples_per_pass):
        sample = stream.sample(0, j)
        real = np.concatenate([[True], sample.valid])
        documents = np.searchsorted(ends, sample.tokens[real], side="right")
        changes = np.concatenate([[0], np.cumsum(np.diff(documents) != 0)])
        assert sample.segments[real].tolist() == changes.tolist()
        assert (sample.segments[~real] == changes[-1] + 1).all()
        assert (sample.tokens[~real] == 0).all()


def test_a_mixture_reads_the_sources_it_says(corpus: Make):
    corpora = {"a": Corpus.open(corpus([30, 0, 50]).prefix), "b": Corpus.open(corpus([200]).prefix)}
    sources = [source_of("a", corpora["a"], epochs=2), source_of("b", corpora["b"], weight=0.5)]
    assert [(s.documents, s.tokens) for s in sources] == [(3, 80), (1, 200)]
    assert sources[0].digest != sources[1].digest
    mixture = solve(sources, 16, 4, 7)
    blend = BlendedDataset(mixture, corpora, VOCABULARY)
    for k in range(mixture.samples + 3):
        source, number, row = mixture.locate(k)
        expected = SourceStream(corpora["ab"[source]], "ab"[source], 16, 7, VOCABULARY).sample(number, row)
        sample = blend.sample(k)
        assert sample.source == source
        assert sample.tokens.tolist() == expected.tokens.tolist()


def test_a_foreign_token_is_named_with_its_file_and_document(corpus: Make):
    dataset = corpus([10, 0, 10, 10])
    stream = stream_over(dataset, 30, vocab_size=25)
    with pytest.raises(
        UserError, match=rf"{dataset.prefix}\.bin: document 3 holds token 25, but the vocabulary has 25"
    ):
        stream.sample(0, 0)
    stream = stream_over(dataset, 30, vocab_size=30)
    assert stream.sample(0, 0).tokens.max() == 29


def test_a_negative_token_is_foreign(tmp_path: Path):
    write_dataset(tmp_path / "x", np.dtype(np.int32), [np.array([1, 2]), np.array([3, -4])])
    with pytest.raises(UserError, match="document 1 holds token -4"):
        stream_over(IndexedDataset(tmp_path / "x"), 8).sample(0, 0)


def test_an_eval_set_is_fixed_and_ends_in_padding(corpus: Make):
    dataset = corpus([40, 30, 35])
    stream = stream_over(dataset, 10)
    whole, part = EvalSet(stream), EvalSet(stream, limit=4)
    assert (len(whole), len(part), len(EvalSet(stream, limit=99))) == (11, 4, 11)
    rows = [bijection(seeded_key("held-out samples"), 11, k) for k in range(11)]
    assert sorted(rows) == list(range(11))
    check_pass(dataset, [whole.sample(rows.index(row)) for row in range(11)])
    assert part.sample(3).tokens.tolist() == whole.sample(3).tokens.tolist()
    for reader in (whole, part):
        beyond = reader.sample(len(reader))
        assert not beyond.valid.any()
        assert beyond.tokens.tolist() == [0] * 11


def test_part_of_a_set_is_not_one_long_document(corpus: Make):
    stream = stream_over(corpus([10_000, 10_000, 10_000, 10_000, 50, 50]), 10)
    part = EvalSet(stream, limit=40)
    found = [int(part.sample(k).tokens[0]) // 10_000 for k in range(40)]
    assert min(np.bincount(found, minlength=4)[:4]) >= 5


def test_an_eval_set_without_a_target_is_refused(corpus: Make):
    with pytest.raises(UserError, match="3 documents with 1 tokens are too few"):
        EvalSet(stream_over(corpus([0, 1, 0]), 10))
