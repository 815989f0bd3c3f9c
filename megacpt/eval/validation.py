"""Loss on a held-out set, over all ranks of any layout."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megacpt.data.samples.batches import BatchLayout, micro_batches
from megacpt.data.samples.blended import EvalSet
from megacpt.model.forward import run_batches, stage_reads_batches


@dataclass(frozen=True)
class Validation:
    """Mean loss per target token (nats) and the number of target tokens behind it."""

    loss: float
    tokens: int


@torch.no_grad()
def evaluate(
    chunks: Sequence[torch.nn.Module], eval_set: EvalSet, layout: BatchLayout, seq_length: int, *, documents: bool
) -> Validation:
    """Forward the whole set; what is missing to the last global batch is padding that counts nothing."""
    for chunk in chunks:
        chunk.eval()
    totals = torch.zeros(2, dtype=torch.float64)
    reads = stage_reads_batches(documents)
    for start in range(0, len(eval_set), layout.global_batch_size):
        span = range(start, start + layout.global_batch_size)
        batches = (
            list(micro_batches(eval_set, layout, span, documents=documents)) if reads else [{}] * layout.micro_batches
        )
        totals += run_batches(chunks, batches, 1, (layout.micro_batch_size, seq_length), train=False)[:, 0].cpu()
    for chunk in chunks:
        chunk.train()
    return Validation(float(totals[0] / totals[1]), int(totals[1]))
