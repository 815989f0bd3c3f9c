"""Cross-entropy of hidden states through an output layer, without the logits of more than a chunk of tokens at a time.

A chunk's logits are one matrix product into a buffer that all chunks share, go through the stages of `vocabulary`, and
are overwritten with their gradient, which two more products turn into the gradients of hidden states and weight.
Weight gradients of chunks add up in fp32. Vocabulary-parallel: each rank has its rows of the weight, as Megatron's
output layer does, and ranks exchange three fp32 numbers a token.

Two forms. `linear_cross_entropy` returns losses that may be used in any way; backward computes the logits again, so
8 n h V operations in all. `linear_cross_entropy_sum` returns their sum under weights known beforehand, of which only a
multiple can be asked back; gradients are made in forward while the logits are there, so 6 n h V, for a weight gradient
that lives until backward. Cut Cross-Entropy (Wijmans et al., arXiv 2411.09009) recomputes as well; Liger-Kernel's
fused linear cross-entropy (Hsu et al., arXiv 2410.10989) makes gradients in forward.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megacpt_kernels.cross_entropy import check, cross_entropy_reference, flat_mask
from megacpt_kernels.token_losses import SourceSums, token_losses
from megacpt_kernels.vocabulary import Shard, gather, logit_gradient_, statistics


@dataclass(frozen=True)
class HeadOptions:
    """How a linear cross-entropy runs, beside its mathematics.

    Attributes:
        chunk_bytes: most bytes of logits that exist at a time; at least one token's do.
        reduce_hidden_grad: sum the hidden states' gradient over the group, as every rank used all of them. False where
            the caller does it: under sequence parallelism, where the gather's backward is a reduce-scatter.
        fuse_main_grad: add the gradient of a trained weight to `weight.main_grad`, in chunks if that is fp32, and set
            `grad_added_to_main_grad`, as Megatron's gradient accumulation fusion does; autograd gets a placeholder.
    """

    chunk_bytes: int = 1 << 28
    reduce_hidden_grad: bool = True
    fuse_main_grad: bool = False


DEFAULT = HeadOptions()


@dataclass
class _WeightGradient:
    """fp32 sum of chunks' weight gradients, in a buffer of its own or in Megatron's."""

    total: torch.Tensor

    def add(self, dlogits: torch.Tensor, hidden: torch.Tensor) -> None:
        """total += dlogits^T hidden, [c, v] and [c, h] of one dtype."""
        if self.total.device.type == "cuda" and hidden.dtype != torch.float32:
            torch.addmm(self.total, dlogits.t(), hidden, out_dtype=torch.float32, out=self.total)
        else:
            self.total.addmm_(dlogits.t().float(), hidden.float())


def _chunks(hidden: torch.Tensor, weight: torch.Tensor, options: HeadOptions) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each chunk of tokens and its logits, in a buffer that the next chunk takes over."""
    tokens, columns = hidden.shape[0], weight.shape[0]
    rows = max(1, min(tokens, options.chunk_bytes // max(1, columns * hidden.element_size())))
    buffer = torch.empty((rows, columns), dtype=hidden.dtype, device=hidden.device)
    for start in range(0, tokens, rows):
        part = slice(start, min(start + rows, tokens))
        logits = buffer[: part.stop - part.start]
        torch.mm(hidden[part], weight.t(), out=logits)
        yield part, logits


class _HiddenGradient:
    """[n, h] gradient, summed over ranks chunk by chunk while the next chunk is computed."""

    def __init__(self, like: torch.Tensor, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.total = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        self.pending: list[Any] = []

    def set(self, part: slice, dlogits: torch.Tensor, weight: torch.Tensor) -> None:
        """The rows of a chunk: dlogits [c, v] times weight [v, h]."""
        torch.mm(dlogits, weight, out=self.total[part])
        if self.group is not None:
            self.pending.append(dist.all_reduce(self.total[part], group=self.group, async_op=True))

    def wait(self) -> torch.Tensor:
        """The gradient, when every chunk's sum has arrived."""
        for handle in self.pending:
            handle.wait()
        return self.total


def _sum_of_chunks(weight: torch.Tensor, main_grad: torch.Tensor | None) -> _WeightGradient:
    """Where chunks add up: `main_grad` itself if it is fp32."""
    if main_grad is not None and main_grad.dtype == torch.float32:
        return _WeightGradient(main_grad)
    return _WeightGradient(torch.zeros(weight.shape, dtype=torch.float32, device=weight.device))


def _placeholder(weight: torch.Tensor) -> torch.Tensor:
    """What autograd gets where the gradient is in `main_grad` already: zeros if whoever reads it adds it up."""
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        mask: torch.Tensor | None,
        shard: Shard,
        options: HeadOptions,
    ) -> torch.Tensor:
        local = torch.empty((3, hidden.shape[0]), dtype=torch.float32, device=hidden.device)
        for part, logits in _chunks(hidden, weight, options):
            local[:, part] = statistics(logits, targets[part], shard)
        normaliser, losses = token_losses(gather(local, shard.group), mask)
        ctx.save_for_backward(hidden, weight, targets, mask, normaliser)
        ctx.shard, ctx.options = shard, options
        ctx.main_grad = getattr(weight, "main_grad", None) if options.fuse_main_grad else None
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, mask, normaliser = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        upstream = dlosses.float() if mask is None else dlosses.float().where(mask != 0, 0.0)
        dhidden = _HiddenGradient(hidden, ctx.shard.group if ctx.options.reduce_hidden_grad else None)
        dweight = _sum_of_chunks(weight, ctx.main_grad) if wants_weight else None
        for part, logits in _chunks(hidden, weight, ctx.options):
            logit_gradient_(logits, targets[part], normaliser[part], upstream[part].contiguous(), ctx.shard)
            if wants_hidden:
                dhidden.set(part, logits, weight)
            if dweight is not None:
                dweight.add(logits, hidden[part])
        returned = None
        if dweight is not None and ctx.main_grad is not None:
            if dweight.total is not ctx.main_grad:
                ctx.main_grad.add_(dweight.total)
            returned = _placeholder(weight)
        elif dweight is not None:
            returned = dweight.total.to(weight.dtype)
        return dhidden.wait() if wants_hidden else None, returned, None, None, None, None


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        token_weights: torch.Tensor,
        shard: Shard,
        options: HeadOptions,
        sources: SourceSums | None,
        differentiable: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wants_hidden, wants_weight = (differentiable and wanted for wanted in ctx.needs_input_grad[:2])
        mask = flat_mask(token_weights)
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        dhidden = _HiddenGradient(hidden, shard.group if options.reduce_hidden_grad else None) if wants_hidden else None
        dweight = _sum_of_chunks(weight, None) if wants_weight else None
        for part, logits in _chunks(hidden, weight, options):
            gathered = gather(statistics(logits, targets[part], shard), shard.group)
            normaliser, losses[part] = token_losses(
                gathered, None if mask is None else mask[part], None if sources is None else sources.rows(part)
            )
            if dhidden is None and dweight is None:
                continue
            logit_gradient_(logits, targets[part], normaliser, token_weights[part], shard)
            if dhidden is not None:
                dhidden.set(part, logits, weight)
            if dweight is not None:
                dweight.add(logits, hidden[part])
        ctx.save_for_backward(
            None if dhidden is None else dhidden.wait(), None if dweight is None else dweight.total, weight
        )
        ctx.main_grad = getattr(weight, "main_grad", None) if options.fuse_main_grad else None
        ctx.mark_non_differentiable(losses)
        return (losses * token_weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dhidden, dweight, weight = ctx.saved_tensors
        returned = None
        if dweight is not None and ctx.main_grad is not None:
            ctx.main_grad.addcmul_(dweight, dtotal)
            returned = _placeholder(weight)
        elif dweight is not None:
            returned = dweight.mul_(dtotal).to(weight.dtype)
        return None if dhidden is None else dhidden.mul_(dtotal), returned, *(None,) * 6


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    real_rows: int | None = None,
) -> torch.Tensor:
    """`cross_entropy_reference` of `hidden @ weight.T`, all logits at once in fp32, on one rank; differentiable."""
    return cross_entropy_reference(hidden.float() @ weight.float().t(), targets, mask, real_rows=real_rows)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    real_rows: int | None = None,
    group: dist.ProcessGroup | None = None,
    options: HeadOptions = DEFAULT,
) -> torch.Tensor:
    """The loss of each token, differentiable in hidden states and weight with any upstream gradient.

    Args:
        hidden: [..., h] fp32 or bf16, the same on every rank of `group`.
        weight: [V / ranks, h] in the dtype of `hidden`, this rank's rows of the output layer.
        targets: [...] integers in the whole vocabulary. One that is no token has the loss +inf.
        mask: [...], 0 where a token has no loss and no gradient; None: all have.
        real_rows: this rank's leading rows that are tokens; the rest is padding. None: all.
        group: the ranks that share the vocabulary, in its order; None: this one has it all.
        options: chunk size, who sums the hidden states' gradient, where the weight's goes.

    Returns:
        [...] fp32.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    check(hidden, targets, mask)
    _check_weight(hidden, weight, options)
    shard = Shard.of(weight.shape[0], real_rows, group)
    rows = hidden.reshape(-1, hidden.shape[-1])
    losses = _LinearCrossEntropy.apply(rows, weight, targets.flatten(), flat_mask(mask), shard, options)
    return losses.view(targets.shape)


def linear_cross_entropy_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    real_rows: int | None = None,
    group: dist.ProcessGroup | None = None,
    options: HeadOptions = DEFAULT,
    sources: SourceSums | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum(token_weights * losses), differentiable, and the losses, which are not; logits are computed once.

    Arguments are those of `linear_cross_entropy`, but for `token_weights` [...], any dtype, in place of the mask: a
    loss mask, or that over a number of tokens. Tokens of weight 0 have the loss 0. Forward computes gradients if
    anything here requires one and gradients are on; the weight's, fp32, stays until backward, which turns it into the
    one asked for and so can be run once. `sources` adds up the losses, and the tokens of a weight, of each source.

    Returns:
        A scalar and [...], fp32.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    check(hidden, targets, token_weights, sources)
    _check_weight(hidden, weight, options)
    shard = Shard.of(weight.shape[0], real_rows, group)
    rows = hidden.reshape(-1, hidden.shape[-1])
    weights = token_weights.detach().float().flatten()
    total, losses = _LinearCrossEntropySum.apply(
        rows, weight, targets.flatten(), weights, shard, options, sources, torch.is_grad_enabled()
    )
    return total, losses.view(targets.shape)


def _check_weight(hidden: torch.Tensor, weight: torch.Tensor, options: HeadOptions) -> None:
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight is {weight.dtype} {tuple(weight.shape)}, hidden {hidden.dtype} {tuple(hidden.shape)}: "
            "weight is [rows, h] in the dtype of hidden [..., h]"
        )
    if options.fuse_main_grad and weight.requires_grad and getattr(weight, "main_grad", None) is None:
        raise ValueError("fuse_main_grad needs weight.main_grad, which Megatron's DistributedDataParallel makes")
