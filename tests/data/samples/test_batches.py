import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.mixture.mixture import Source
from megacpt.data.mixture.order import PassOrder, shuffled_pass
from megacpt.data.mixture.solve import solve
from megacpt.data.samples.batches import BatchLayout, ahead, collate, micro_batches
from megacpt.data.samples.blended import BlendedDataset, Corpus, EvalSet, Sample, SourceStream
from megacpt.data.tokens.indexed import IndexedDataset
from megacpt.errors import UserError

Make = Callable[[Sequence[int]], IndexedDataset]
VOCABULARY = 1 << 20


@pytest.fixture(scope="module")
def blend(corpus: Make) -> BlendedDataset:
    lengths = np.random.default_rng(0).integers(0, 30, (2, 60)).tolist()
    corpora = {name: Corpus.open(corpus(part).prefix) for name, part in zip("ab", lengths, strict=True)}
    sources = [
        Source("a", len(corpora["a"]), corpora["a"].tokens, epochs=2),
        Source("b", len(corpora["b"]), corpora["b"].tokens, weight=0.3),
    ]
    return BlendedDataset(solve(sources, 16, 8, 7), corpora, VOCABULARY)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
def test_ranks_share_a_global_batch_without_gap_or_overlap(micro: int, dp_size: int, steps: int, consumed: int):
    batch = micro * dp_size * steps
    rows = [BatchLayout(batch, micro, rank, dp_size).rows(consumed) for rank in range(dp_size)]
    assert all(len(own) == steps and all(len(row) == micro for row in own) for own in rows)
    together = [k for step in range(steps) for own in rows for k in own[step]]
    assert together == list(range(consumed, consumed + batch))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(
        UserError, match="global_batch_size 12 is not divisible by micro_batch_size 2 x data-parallel size 4"
    ):
        BatchLayout(12, 2, 0, 4)


@pytest.mark.parametrize(("batch", "micro", "dp_size"), [(8, 2, 1), (8, 1, 4), (4, 4, 1), (16, 2, 2)])
def test_samples_do_not_depend_on_how_they_are_batched(blend: BlendedDataset, batch: int, micro: int, dp_size: int):
    expected = [blend.sample(k).tokens[:-1].tolist() for k in range(64)]
    ranks = [micro_batches(blend, BatchLayout(batch, micro, rank, dp_size), range(64)) for rank in range(dp_size)]
    seen = [row for step in zip(*ranks, strict=True) for part in step for row in part["tokens"].tolist()]
    assert seen == expected


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_iterator_goes_on_anywhere_with_any_number_of_workers(blend: BlendedDataset, workers: int):
    layout, end = BatchLayout(8, 2), blend.mixture.stop
    whole = list(micro_batches(blend, layout, range(end), workers=0, documents=True))
    rest = list(micro_batches(blend, layout, range(16, end), workers, documents=True))
    assert len(whole) == 4 * blend.mixture.steps
    for one, other in zip(whole[8:], rest, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_collate_gives_shapes_dtypes_and_the_right_values(blend: BlendedDataset):
    samples = [blend.sample(k) for k in range(3)]
    batch = collate(samples)
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "tokens": ((3, 16), torch.int64),
        "labels": ((3, 16), torch.int64),
        "loss_mask": ((3, 16), torch.float32),
        "source": ((3,), torch.int64),
    }
    for i, sample in enumerate(samples):
        assert batch["tokens"][i].tolist() == sample.tokens[:-1].tolist()
        assert batch["labels"][i].tolist() == sample.tokens[1:].tolist()
        assert batch["loss_mask"][i].tolist() == sample.valid.astype(float).tolist()
        assert batch["source"][i] == sample.source


def test_positions_begin_again_in_every_document_and_in_padding(corpus: Make):
    stream = SourceStream(Corpus.open(corpus([3, 1, 4]).prefix), "x", 9, 1, VOCABULARY)
    lengths = stream.dataset.lengths[stream.order(0).documents].tolist()
    batch = collate([stream.sample(0, 0), stream.sample(0, 0)], documents=True)
    for row in range(2):
        assert batch["document_ids"][row].tolist() == [i for i, n in enumerate([*lengths, 1]) for _ in range(n)]
        assert batch["position_ids"][row].tolist() == [p for n in [*lengths, 1] for p in range(n)]
        assert batch["loss_mask"][row].tolist() == [1.0] * 7 + [0.0] * 2
    assert (batch["document_ids"].dtype, batch["position_ids"].dtype) == (torch.int32, torch.int64)


def test_positions_do_not_run_on_from_the_row_before():
    segments = np.zeros(4, dtype=np.int32)
    sample = Sample(np.arange(4), np.ones(3, dtype=bool), segments, 0)
    assert collate([sample, sample], documents=True)["position_ids"].tolist() == [[0, 1, 2]] * 2


def test_eval_sets_of_any_size_fill_whole_batches(corpus: Make):
    stream = SourceStream(Corpus.open(corpus([50, 21]).prefix), "valid", 10, 1, VOCABULARY)
    ranks = [micro_batches(EvalSet(stream), BatchLayout(4, 2, rank, 2), range(len(EvalSet(stream)))) for rank in (0, 1)]
    masks = [batch["loss_mask"] for rank in ranks for batch in rank]
    assert len(masks) == 4
    assert sum(float(mask.sum()) for mask in masks) == 70


def test_reading_ahead_is_bounded_keeps_order_and_stops_when_closed():
    taken: list[int] = []

    def load(request: int) -> int:
        time.sleep(0.002 * (request % 3))
        return request

    iterator = ahead(load, (taken.append(k) or k for k in range(1000)), workers=2)
    assert [next(iterator) for _ in range(5)] == [0, 1, 2, 3, 4]
    iterator.close()
    assert len(taken) == 9
    assert [thread for thread in threading.enumerate() if thread.name.startswith("data")] == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_out_in_its_turn(corpus: Make, workers: int):
    stream = SourceStream(Corpus.open(corpus([100]).prefix), "x", 10, 1, vocab_size=55)
    reader = SimpleNamespace(sample=lambda k: stream.sample(0, k))
    iterator = micro_batches(reader, BatchLayout(1, 1), range(10), workers)
    assert sum(1 for _ in zip(range(5), iterator, strict=False)) == 5
    with pytest.raises(UserError, match="holds token 55"):
        next(iterator)


def test_threads_shuffle_a_pass_once(corpus: Make, monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []

    def slow(lengths: np.ndarray, seed: int, name: str, number: int) -> PassOrder:
        calls.append(number)
        time.sleep(0.05)
        return shuffled_pass(lengths, seed, name, number)

    monkeypatch.setattr("megacpt.data.samples.blended.shuffled_pass", slow)
    stream = SourceStream(Corpus.open(corpus([40, 40]).prefix), "x", 10, 1, VOCABULARY)
    list(ahead(lambda k: stream.sample(*divmod(k, 8)), range(16), workers=4))
    assert calls == [0, 1]
