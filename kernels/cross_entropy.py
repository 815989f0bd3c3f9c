"""Cross-entropy from logits that are spread over the vocabulary of a tensor-parallel group.

The logits are never copied or upcast: forward reads them once (`vocabulary`), and backward writes their gradient over
them, in their dtype with fp32 arithmetic. On a CPU, forward already writes probabilities over fp32 logits that need a
gradient. Ranks exchange three fp32 numbers a token in one all-gather; backward needs no collective.
"""

from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megacpt_kernels.dispatch import runs_triton
from megacpt_kernels.token_losses import SourceSums, token_losses
from megacpt_kernels.vocabulary import (
    Shard,
    gather,
    logit_gradient_,
    softmax_gradient_,
    softmax_statistics_,
    statistics,
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        mask: torch.Tensor | None,
        shard: Shard,
        sources: SourceSums | None,
    ) -> torch.Tensor:
        on_cpu = not runs_triton(logits, targets)
        ctx.probabilities = on_cpu and ctx.needs_input_grad[0] and logits.dtype == torch.float32
        own = None
        if ctx.probabilities:
            local = softmax_statistics_(logits, targets, shard)
            torch.autograd.graph.increment_version(logits)
            if shard.group is not None:
                own = local[0] + local[1].log()
        else:
            local = statistics(logits, targets, shard)
        normaliser, losses = token_losses(gather(local, shard.group), mask, sources)
        ctx.save_for_backward(logits, targets, mask, normaliser, own)
        ctx.shard = shard
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, targets, mask, normaliser, own = ctx.saved_tensors
        upstream = (dlosses.float() if mask is None else dlosses.float().where(mask != 0, 0.0)).contiguous()
        if ctx.probabilities:
            scale = upstream if own is None else upstream * (own - normaliser).exp_()
            softmax_gradient_(logits, targets, scale, upstream, ctx.shard)
        else:
            logit_gradient_(logits, targets, normaliser, upstream, ctx.shard)
        # Autograd sees no kernel's writes: whoever else kept these logits for backward is told, a second backward too.
        torch.autograd.graph.increment_version(logits)
        return logits, None, None, None, None


def cross_entropy_reference(
    logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None = None, *, real_rows: int | None = None
) -> torch.Tensor:
    """Cross-entropy of whole logits in fp32, differentiable: what `vocab_parallel_cross_entropy` computes on one rank.

    Args:
        logits: [..., V], fp32 or bf16.
        targets: [...] integers below the number of real rows.
        mask: [...], 0 where a token has no loss; None: all have.
        real_rows: leading columns that are tokens; the rest is padding and has no probability. None: all.

    Returns:
        [...] fp32.
    """
    wide = logits[..., :real_rows].float()
    counted = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask != 0
    wanted = wide.gather(-1, targets.where(counted, 0).long()[..., None])[..., 0]
    return (wide.logsumexp(-1) - wanted).where(counted, 0.0)


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    real_rows: int | None = None,
    group: dist.ProcessGroup | None = None,
    sources: SourceSums | None = None,
) -> torch.Tensor:
    """The loss of each token; `backward` overwrites the logits with their gradient.

    On a CPU, forward has already overwritten fp32 logits that need one. Logits can therefore be used once: a second
    backward through them raises autograd's error about tensors that were modified in place. Every rank of `group` calls
    with the same tokens and gets the same losses.

    Args:
        logits: [..., V / ranks] fp32 or bf16, this rank's columns, adjacent in memory; a row may have any stride.
        targets: [...] integers in the whole vocabulary. One that is no token, padding for instance, has the loss +inf.
        mask: [...], 0 where a token has no loss and no gradient, whatever its target; None: all have.
        real_rows: this rank's leading columns that are tokens; the rest is padding, with no probability and gradient 0.
        group: the ranks that share the vocabulary, in its order, equally many columns each; None: this one has it all.
        sources: adds up the losses, and the tokens that have one, of each source.

    Returns:
        [...] fp32.

    Raises:
        ValueError: shapes that do not belong together, or logits that cannot be overwritten row by row.
    """
    check(logits, targets, mask, sources)
    shard = Shard.of(logits.shape[-1], real_rows, group)
    of_rows = None if sources is None else sources.rows()
    losses = _CrossEntropy.apply(_own_rows(logits), targets.flatten(), flat_mask(mask), shard, of_rows)
    return losses.view(targets.shape)


def _own_rows(logits: torch.Tensor) -> torch.Tensor:
    """[..., columns] as [rows, columns] of the same memory, no element of which is two rows'."""
    if logits.is_contiguous():
        return logits.flatten(0, -2)
    columns = logits.shape[-1]
    rows = None
    with suppress(RuntimeError):
        rows = logits.view(-1, columns)
    if rows is None or (columns > 1 and rows.stride(1) != 1) or (rows.shape[0] > 1 and rows.stride(0) < columns):
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and strides {logits.stride()} cannot be overwritten with their "
            "gradient: columns must be adjacent in memory, and rows equally far apart, without overlap"
        )
    return rows


def check(
    values: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None, sources: SourceSums | None = None
) -> None:
    """Refuse targets, a mask, or sources that are not one for each row of `values` [..., columns].

    Raises:
        ValueError: they are not.
    """
    if targets.shape != values.shape[:-1] or (mask is not None and mask.shape != targets.shape):
        given = "none" if mask is None else tuple(mask.shape)
        raise ValueError(
            f"targets are {tuple(targets.shape)} and the mask {given}; both must be {tuple(values.shape[:-1])}, "
            "one a token"
        )
    if sources is not None and sources.ids.shape != targets.shape:
        raise ValueError(f"ids of sources are {tuple(sources.ids.shape)}, targets {tuple(targets.shape)}: one a token")


def flat_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """[...] of any dtype to [rows] uint8, 1 where it is not 0."""
    return None if mask is None else (mask != 0).flatten().view(torch.uint8)
