"""One micro-batch through the pipeline: the forward step and the loss that megatron-core's schedules call.

Loss is the sum over unmasked tokens divided by their global count, so it does not depend on how a global batch is cut.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

Batch = dict[str, torch.Tensor]


def stage_reads_batches(documents: bool) -> bool:
    """Whether this pipeline stage needs tokens: the ends do; the middle only for masks that follow documents."""
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    return documents or first or parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def document_mask(document_ids_BS: torch.Tensor) -> torch.Tensor:
    """Bool [b, 1, s, s], True where a position must not look: the future, and other documents."""
    size = document_ids_BS.shape[1]
    other = document_ids_BS[:, :, None] != document_ids_BS[:, None, :]
    future = torch.ones(size, size, dtype=torch.bool, device=document_ids_BS.device).triu(1)
    return (other | future)[:, None]


def loss_sums(losses_BS: torch.Tensor, mask_BS: torch.Tensor, source_B: torch.Tensor, sources: int) -> torch.Tensor:
    """Loss and unmasked tokens by source: float64 [2, sources]."""
    per_sample = torch.stack([(losses_BS.detach() * mask_BS).double().sum(1), mask_BS.double().sum(1)])
    return per_sample.new_zeros(2, sources).index_add_(1, source_B, per_sample)


def _loss(batch: Batch, sources: int, losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = batch["loss_mask"]
    sums = loss_sums(losses_BS, mask, batch["source"], sources)
    return (losses_BS * mask).sum(), mask.sum().to(torch.int), sums


def forward_step(
    sources: int, device: torch.device, iterator: Iterator[Batch], model: torch.nn.Module
) -> tuple[Any, Callable[..., Any]]:
    """Run one micro-batch through this stage; returns its output and the function that turns it into the loss."""
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(iterator).items()}
    losses = model(*model_inputs(batch), labels=batch.get("labels"))
    return losses, partial(_loss, batch, sources)


def model_inputs(batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Tokens [b, s], position ids [b, s] and attention mask of a micro-batch; None what this stage does not need."""
    documents = batch.get("document_ids")
    tokens = batch.get("tokens")
    positions = batch.get("position_ids")
    if positions is None and tokens is not None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return tokens, positions, None if documents is None else document_mask(documents)


def run_schedule(
    step: Callable[..., Any],
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Batch],
    sample_shape: tuple[int, int],
    **options: bool,
) -> list[Any]:
    """megatron-core's pipeline schedule over this rank's micro-batches; what `step`'s second function gave for each.

    Args:
        batches: this rank's micro-batches; empty dicts on a stage that needs none.
        sample_shape: (micro-batch size, seq_length), which pipeline stages agree on.
        options: further arguments of the schedule.
    """
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        micro_batch_size=sample_shape[0],
        seq_length=sample_shape[1],
        **options,
    )


def run_batches(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Batch],
    sources: int,
    sample_shape: tuple[int, int],
    *,
    train: bool,
) -> torch.Tensor:
    """Forward (and backward) over this rank's micro-batches; loss and tokens by source over all ranks.

    Args:
        batches: this rank's micro-batches; empty dicts on a stage that needs none.
        sample_shape: (micro-batch size, seq_length), which pipeline stages agree on.

    Returns:
        float64 [2, sources] on every rank: summed loss, unmasked tokens.
    """
    device = next(chunks[0].parameters()).device
    step = partial(forward_step, sources, device)
    results = run_schedule(step, chunks, batches, sample_shape, forward_only=not train)
    sums = torch.zeros(2, sources, dtype=torch.float64, device=device)
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        for micro_batch in results:
            sums += micro_batch
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(sums, last, group=parallel_state.get_pipeline_model_parallel_group())
    return sums
