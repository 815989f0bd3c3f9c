"""What a batch's targets cost and whether they were the likeliest tokens: one forward pass, sums by sample."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megacpt.model.forward import Batch, run_schedule, stage_inputs
from megacpt.model.gpt import unwrap

COLUMNS = 3
"""Of a sample's sums: loss in nats, targets that were the likeliest token, targets."""


def score_micro_batches(
    chunks: Sequence[torch.nn.Module], batches: Sequence[Batch], sample_shape: tuple[int, int]
) -> torch.Tensor | None:
    """Forward over this rank's micro-batches, nothing exchanged with other data-parallel ranks.

    Returns:
        float64 [micro-batches, b, COLUMNS] on the last pipeline stage; None on the others.
    """
    device = next(chunks[0].parameters()).device
    sums = run_schedule(
        partial(_forward_step, device), chunks, batches, sample_shape, forward_only=True, collect_non_loss_data=True
    )
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    everything = torch.stack(sums)
    if parallel_state.get_context_parallel_world_size() > 1:
        dist.all_reduce(everything, group=parallel_state.get_context_parallel_group())
    return everything


def gather_samples(local: torch.Tensor | None, micro_batches: int, micro_batch_size: int) -> torch.Tensor:
    """The sums of all data-parallel ranks in the order of samples, on every rank.

    Args:
        local: float64 [micro-batches, b, COLUMNS], all of `score_micro_batches`; None off the last stage.

    Returns:
        float64 [micro-batches x DP x b, COLUMNS], on the CPU.
    """
    ranks = parallel_state.get_data_parallel_world_size()
    shape = (ranks, micro_batches, micro_batch_size, COLUMNS)
    everything = torch.empty(shape, dtype=torch.float64, device=torch.cuda.current_device())
    if local is not None:
        parts = list(everything.unbind())
        dist.all_gather(parts, local.contiguous(), group=parallel_state.get_data_parallel_group())
        everything = torch.stack(parts)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(everything, last, group=parallel_state.get_pipeline_model_parallel_group())
    return everything.transpose(0, 1).flatten(0, 2).cpu()


def likeliest_tokens(logits: torch.Tensor, real_rows: int) -> torch.Tensor:
    """The token with the largest logit, the lowest of equal ones; int64, without the last dimension.

    Args:
        logits: this tensor-parallel rank's part of the vocabulary, [..., v/TP]; left as it is.
        real_rows: rows of that part that are tokens; padding cannot be predicted.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    shape, rows = logits.shape[:-1], logits.shape[-1]
    if real_rows:
        top, index = logits[..., :real_rows].max(-1)
    else:
        top, index = logits.new_full(shape, float("-inf")), torch.zeros(shape, dtype=torch.long, device=logits.device)
    highest = top.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    nobody = torch.iinfo(torch.long).max
    winner = torch.where(top == highest, index + rows * dist.get_rank(group), nobody)
    dist.all_reduce(winner, dist.ReduceOp.MIN, group=group)
    return winner


def _forward_step(device: torch.device, iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
    own = unwrap(model)
    batch, inputs = stage_inputs(next(iterator), device, engine=own.engine)
    output = model(**inputs, output_processor=partial(_losses_and_hits, own.real_rows))
    return output, partial(_sums, batch)


def _losses_and_hits(real_rows: int, *, hidden_states: torch.Tensor, labels: torch.Tensor, **head: Any) -> torch.Tensor:
    """In the place of megatron-core's output head: [2, b, s], losses and 1 where the target was the likeliest token."""
    logits_SBV, _ = head["output_layer"](
        hidden_states, weight=head["output_weight"], runtime_gather_output=head["runtime_gather_output"]
    )
    # First, for megatron-core's loss overwrites the logits.
    hits = likeliest_tokens(logits_SBV, real_rows).t() == labels
    losses = head["compute_language_model_loss"](labels, logits_SBV)
    return torch.stack([losses, hits.to(losses.dtype)])


def _sums(batch: Batch, output: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
    assert non_loss_data
    mask = batch["loss_mask"]
    losses, hits = output.view(2, *mask.shape)
    return torch.stack([(losses * mask).double().sum(1), (hits * mask).double().sum(1), mask.double().sum(1)], dim=1)
