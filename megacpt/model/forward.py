"""One micro-batch through the pipeline: the forward step and the loss that megatron-core's schedules call.

Loss is the sum over unmasked tokens divided by their global count, so it does not depend on how a global batch is cut.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from megacpt.model.context import context_place, own_positions
from megacpt.model.gpt import unwrap
from megacpt_kernels.token_losses import SourceSums

Batch = dict[str, torch.Tensor]


def stage_reads_batches(documents: bool) -> bool:
    """Whether this pipeline stage needs tokens: the ends do; the middle only for masks that follow documents."""
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    return documents or first or parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def document_mask(document_ids_BS: torch.Tensor, size: int = 1, rank: int = 0) -> torch.Tensor:
    """Bool [b, 1, s / CP, s], True where a position must not look: the future, and other documents.

    Args:
        document_ids_BS: of the whole sequence.
        size, rank: the context-parallel rank whose positions look.
    """
    places = torch.arange(document_ids_BS.shape[1], device=document_ids_BS.device)
    own_ids, own_places = own_positions(document_ids_BS, size, rank, dim=1), own_positions(places, size, rank)
    other = own_ids[:, :, None] != document_ids_BS[:, None, :]
    return (other | (places > own_places[:, None]))[:, None]


def packed_documents(document_ids_BS: torch.Tensor) -> PackedSeqParams:
    """Where documents begin in a micro-batch laid out as one row, for attention and rotary phases inside them.

    Args:
        document_ids_BS: on the CPU, where reading the boundaries costs no synchronisation.

    Returns:
        qkv_format "thd"; cu_seqlens int32 [documents + 1] on the CPU, from 0 to b x s; max_seqlen of the longest.
    """
    begins = torch.ones_like(document_ids_BS, dtype=torch.bool)
    begins[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    edges = torch.cat([starts, starts.new_tensor([document_ids_BS.numel()])]).int()
    longest = int(edges.diff().max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=edges, cu_seqlens_kv=edges, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def context_part(batch: Batch, size: int, rank: int) -> Batch:
    """What a context-parallel rank sees of a micro-batch: of tensors [b, s, ...] its chunks of s, others whole."""
    return {name: own_positions(t, size, rank, dim=1) if t.dim() > 1 else t for name, t in batch.items()}


def _loss(
    mask: torch.Tensor, sums: torch.Tensor, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a micro-batch: the sum of its losses, the tokens that have one, and both by source, float64 [2, sources]."""
    return total, mask.sum().to(torch.int), sums


def forward_step(
    sources: int, device: torch.device, iterator: Iterator[Batch], model: torch.nn.Module
) -> tuple[Any, Callable[..., Any]]:
    """Run one micro-batch through this stage; returns its output and the function that turns it into the loss."""
    own = unwrap(model)
    batch, inputs = stage_inputs(next(iterator), device, engine=own.engine)
    if not own.post_process:
        return model(**inputs), _loss
    labels = inputs["labels"]
    ids = batch["source"][:, None].expand_as(batch["labels"]).reshape(labels.shape)
    mask, tally = batch["loss_mask"].view(labels.shape), SourceSums.zeros(ids, sources)
    return model(**inputs, loss_mask=mask, sources=tally), partial(_loss, mask, tally.sums)


def stage_inputs(batch: Batch, device: torch.device, *, engine: bool) -> tuple[Batch, dict[str, Any]]:
    """A micro-batch on the device, this rank's part of it, and the model's arguments made from it.

    Where documents matter, the local layers get a mask [b, 1, s / CP, s]; Transformer Engine's get the micro-batch as
    one row [1, b x s] with the documents' boundaries, and no mask. What this stage does not need is None.
    """
    packed = packed_documents(batch["document_ids"]) if engine and "document_ids" in batch else None
    size, rank = context_place()
    everything = batch.get("document_ids")
    batch = context_part(batch, size, rank)
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    tokens, labels = batch.get("tokens"), batch.get("labels")
    positions = batch.get("position_ids")
    if positions is None and tokens is not None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    mask = None
    if everything is not None and not engine:
        mask = document_mask(everything.to(device, non_blocking=True), size, rank)
    inputs: dict[str, Any] = {"input_ids": tokens, "position_ids": positions, "labels": labels}
    if packed is not None:
        inputs = {name: None if value is None else value.reshape(1, -1) for name, value in inputs.items()}
        edges = packed.cu_seqlens_q.to(device, non_blocking=True)
        packed.cu_seqlens_q = packed.cu_seqlens_kv = edges
        inputs["packed_seq_params"] = packed
    return batch, inputs | {"attention_mask": mask}


def run_schedule(
    step: Callable[..., Any],
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Batch],
    sample_shape: tuple[int, int],
    **options: bool,
) -> list[Any]:
    """megatron-core's pipeline schedule over this rank's micro-batches; what `step`'s second function gave for each.

    Packed documents (see `stage_inputs`) travel between stages as one row.

    Args:
        batches: this rank's micro-batches; empty dicts on a stage that needs none.
        sample_shape: (micro-batch size, seq_length), which pipeline stages agree on.
        options: further arguments of the schedule.
    """
    rows, length = sample_shape
    if unwrap(chunks[0]).engine and any("document_ids" in batch for batch in batches):
        rows, length = 1, rows * length
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        micro_batch_size=rows,
        seq_length=length,
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
