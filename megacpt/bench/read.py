"""Tokens a second out of a dataset on disk, as a run reads them; beside megatron-core's GPTDataset."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megacpt.bench.rows import OURS, Recorder
from megacpt.data.samples.blended import Corpus, SourceStream

SECONDS = 3.0


def rate(read: Callable[[int], object], samples: int) -> float:
    """Calls a second of `read` over 0, 1, 2, ... for a few seconds."""
    began, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < SECONDS:
        for _ in range(16):
            read(done % samples)
            done += 1
    return done / spent


def measure(recorder: Recorder, prefix: str, seq_length: int) -> None:
    """Rows on one dataset: samples of `seq_length` tokens with masks, read in the order of a shuffled pass."""
    stream = SourceStream(Corpus.open(prefix), "bench", seq_length, 1234, 1 << 30)
    case = f"{Path(prefix).name}, samples of {seq_length:,} tokens"
    number = stream.samples_per_pass
    stream.sample(0, 0)
    recorder.add("read", case, OURS, rate(lambda k: stream.sample(0, k), number) * seq_length, "tokens/s", "one thread")
    peer = _megatron(prefix, seq_length, number)
    if peer is not None:
        recorder.add("read", case, "megatron-core GPTDataset", peer * seq_length, "tokens/s", "one thread")


def _megatron(prefix: str, seq_length: int, samples: int) -> float | None:
    """The same of megatron-core's dataset; None where megatron-core is not installed."""
    try:
        import numpy as np
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as cache:
        dataset = IndexedDataset(prefix)
        config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=seq_length,
            split="1,0,0",
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            tokenizer=_Tokenizer(),
            path_to_cache=cache,
        )
        documents = np.arange(len(dataset), dtype=np.int32)
        blend = GPTDataset(dataset, prefix, documents, samples - 1, Split.train, config)
        return rate(lambda k: blend[k % len(blend)], samples)


class _Tokenizer:
    """What GPTDataset asks of a tokenizer."""

    def __init__(self) -> None:
        self.eod = self.pad = self.bos = 0
        self.vocab_size = None
        self.unique_identifiers = {"class": "none"}
