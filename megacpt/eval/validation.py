"""Loss and next-token accuracy on a held-out set, over all ranks of any layout."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from megacpt.data.samples.batches import BatchLayout, micro_batches
from megacpt.data.samples.blended import EvalSet
from megacpt.data.tokens.manifest import read_manifest
from megacpt.errors import UserError
from megacpt.eval.agreement import first_failure
from megacpt.eval.statistics import Measure
from megacpt.model.forward import Batch, stage_reads_batches
from megacpt.model.score import gather_samples, score_micro_batches


class EvaluationFailed(Exception):
    """A set could not be evaluated; raised on every rank, with the first failing rank's sentence."""


@dataclass(frozen=True)
class Validation:
    """A set's sums, sample by sample, the same on every rank and in every layout (within rounding of the forward pass).

    Attributes:
        samples: float64 [n, 3]: summed loss in nats, targets that were the likeliest token, targets.
    """

    samples: np.ndarray

    @cached_property
    def _totals(self) -> list[float]:
        # Rounded once: how samples were dealt to ranks leaves no trace.
        return [math.fsum(column) for column in self.samples.T]

    @property
    def loss(self) -> float:
        """Mean loss per target token in nats."""
        return self._totals[0] / self._totals[2]

    @property
    def accuracy(self) -> float:
        """Share of target tokens that were the model's likeliest."""
        return self._totals[1] / self._totals[2]

    @property
    def tokens(self) -> int:
        """Target tokens."""
        return int(self._totals[2])

    def measures(self) -> dict[str, Measure]:
        """Loss and accuracy, to be resampled sample by sample; an item's key is the number of its sample."""
        keys = tuple(map(str, range(len(self.samples))))
        loss, hits, targets = self.samples.T
        return {"loss": Measure("loss", keys, loss, targets), "accuracy": Measure("accuracy", keys, hits, targets)}


def bits_per_byte(loss: float, eval_set: EvalSet) -> float | None:
    """Loss in bits per byte: a scored target stands for as many bytes of text as a token of the whole dataset does.

    Tokens of the dataset include EOD, whose bits are the text's; its bytes do not. None where the dataset's manifest
    does not count bytes, or is another dataset's.

    Args:
        loss: nats per token.
    """
    dataset, manifest = eval_set.stream.dataset, None
    with suppress(UserError):
        manifest = read_manifest(dataset.prefix)
    if manifest is None or manifest.tokens != dataset.tokens or not manifest.text_bytes:
        return None
    return loss / math.log(2) * dataset.tokens / manifest.text_bytes


def evaluate(
    chunks: Sequence[torch.nn.Module], eval_set: EvalSet, layout: BatchLayout, seq_length: int, *, documents: bool
) -> Validation:
    """Forward the whole set; what is missing to the last global batch is padding that counts nothing.

    Ranks agree before each batch whether all could read it and had got through the one before.

    Raises:
        EvaluationFailed: on every rank.
        RankLost: the forward pass raised on this rank alone, and others wait for it there.
    """
    for chunk in chunks:
        chunk.eval()
    try:
        return Validation(_score(chunks, eval_set, layout, seq_length, documents)[: len(eval_set)].numpy())
    finally:
        for chunk in chunks:
            chunk.train()


@torch.no_grad()
def _score(
    chunks: Sequence[torch.nn.Module], eval_set: EvalSet, layout: BatchLayout, seq_length: int, documents: bool
) -> torch.Tensor:
    reads = stage_reads_batches(documents)
    shape = (layout.micro_batch_size, seq_length)
    failure: Exception | None = None
    parts: list[torch.Tensor | None] = []
    starts = range(0, len(eval_set), layout.global_batch_size)
    for start in starts:
        batches: list[Batch] = [{}] * layout.micro_batches
        try:
            if reads and failure is None:
                span = range(start, start + layout.global_batch_size)
                batches = list(micro_batches(eval_set, layout, span, documents=documents))
        except Exception as error:
            failure = error
        _fail_together(failure)
        try:
            parts.append(score_micro_batches(chunks, batches, shape))
        except Exception as error:
            failure = error
    _fail_together(failure)
    scored = [part for part in parts if part is not None]
    local = torch.cat(scored) if scored else None
    return gather_samples(local, len(starts) * layout.micro_batches, layout.micro_batch_size)


def _fail_together(own: Exception | None) -> None:
    """Raise on every rank if any rank has failed."""
    failure = first_failure(own)
    if failure is not None:
        raise EvaluationFailed(failure) from own
