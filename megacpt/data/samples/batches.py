"""From global samples to the tensors of one rank's micro-batches.

An iterator here is a function of where it begins: nothing but the number of consumed samples has to be saved to go on.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from megacpt.data.samples.blended import Sample, SampleReader
from megacpt.errors import UserError

AHEAD = 2
"""Micro-batches that each worker thread prepares in advance."""


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch falls into micro-batches, and which of them are this data-parallel rank's.

    Raises:
        UserError: the global batch is not a whole number of micro-batches on every rank.
    """

    global_batch_size: int
    micro_batch_size: int
    dp_rank: int = 0
    dp_size: int = 1

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.micro_batch_size * self.dp_size):
            raise UserError(
                f"train.global_batch_size {self.global_batch_size} is not divisible by micro_batch_size "
                f"{self.micro_batch_size} x data-parallel size {self.dp_size}; change one of them"
            )

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a rank in a global batch."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def rows(self, consumed: int) -> list[range]:
        """Global samples of this rank's micro-batches of the batch that begins at sample `consumed`.

        As in Megatron, a micro-batch of all ranks together is a run of consecutive samples.
        """
        size, stride = self.micro_batch_size, self.micro_batch_size * self.dp_size
        first = consumed + self.dp_rank * size
        return [range(start, start + size) for start in range(first, first + self.micro_batches * stride, stride)]


def collate(samples: Sequence[Sample], documents: bool = False) -> dict[str, torch.Tensor]:
    """A micro-batch of b samples of length S.

    Args:
        documents: also say where documents lie, for attention kept inside them.

    Returns:
        tokens, labels: int64 [b, S].
        loss_mask: float32 [b, S], 1 where the label counts.
        source: int64 [b], the number of each sample's source.
        position_ids: int64 [b, S], from 0 in every document (`documents` only).
        document_ids: int32 [b, S], from 0 in every sample; padding has its own (`documents` only).
    """
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    batch = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.from_numpy(np.stack([sample.valid for sample in samples]).astype(np.float32)),
        "source": torch.tensor([sample.source for sample in samples]),
    }
    if documents:
        document_ids = np.stack([sample.segments[:-1] for sample in samples])
        place = np.arange(document_ids.shape[1])
        begins = np.diff(document_ids, axis=1, prepend=-1) != 0
        start = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
        batch["position_ids"] = torch.from_numpy(place - start)
        batch["document_ids"] = torch.from_numpy(document_ids)
    return batch


def micro_batches(
    reader: SampleReader, layout: BatchLayout, span: range, workers: int = 0, documents: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's micro-batches, collated, of all global batches from sample span.start until span.stop is reached.

    Args:
        workers: threads that read ahead; 0 reads when asked. The result does not depend on it.

    Raises:
        UserError: a token is outside the vocabulary.
    """
    rows = (row for consumed in range(span.start, span.stop, layout.global_batch_size) for row in layout.rows(consumed))
    return ahead(lambda row: collate([reader.sample(k) for k in row], documents), rows, workers)


def ahead[Request, Result](
    load: Callable[[Request], Result], requests: Iterable[Request], workers: int
) -> Iterator[Result]:
    """`map(load, requests)`, in order, with up to AHEAD results per thread prepared in advance.

    An error in `load` comes out in its turn; closing the iterator drops what was not asked for.
    """
    if not workers:
        yield from map(load, requests)
        return
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="data") as pool:
        try:
            for request in requests:
                pending.append(pool.submit(load, request))
                if len(pending) > AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
