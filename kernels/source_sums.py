"""Loss and tokens of each source of a batch: sums over [tokens] by source, masked tokens left out, in one pass.

A program for each source reads all tokens, which are few beside logits, so that no atomics are needed and the sums have
the same order in every run. Nothing here is differentiable: these are the numbers of a log line.
"""

import torch
import triton
import triton.language as tl

from megacpt_kernels.dispatch import runs_triton
from megacpt_kernels.launch import launch_for


@triton.jit
def _sums_kernel(
    losses_ptr: tl.tensor,  # [tokens] fp32, in
    sources_ptr: tl.tensor,  # [tokens] integers, in
    mask_ptr: tl.tensor,  # [tokens] uint8, in: 0 is left out; or None
    sums_ptr: tl.tensor,  # [sources] fp32, out
    counts_ptr: tl.tensor,  # [sources] int64, out
    tokens: int,
    BLOCK: tl.constexpr,
) -> None:
    source = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK).to(tl.int64)
        counted = tl.load(sources_ptr + token, mask=token < tokens, other=-1) == source
        if mask_ptr is not None:
            counted = counted & (tl.load(mask_ptr + token, mask=token < tokens, other=0) != 0)
        total += tl.load(losses_ptr + token, mask=counted, other=0.0)
        count += counted.to(tl.int64)
    tl.store(sums_ptr + source, tl.sum(total, 0))
    tl.store(counts_ptr + source, tl.sum(count, 0))


def source_sums_reference(
    losses: torch.Tensor, sources: torch.Tensor, sources_total: int, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the losses of each source and count its tokens.

    Args:
        losses: [...] fp32, one a token.
        sources: [...] integers, the source of each token; a token of another number belongs to none.
        sources_total: S, sources are 0 to S - 1.
        mask: [...], 0 where a token does not count; None: all count.

    Returns:
        Sums [S] fp32 and counts [S] int64.
    """
    belongs = sources.flatten() == torch.arange(sources_total, device=sources.device)[:, None]
    if mask is not None:
        belongs &= mask.flatten() != 0
    return losses.detach().float().flatten().where(belongs, 0.0).sum(1), belongs.sum(1)


def source_sums(
    losses: torch.Tensor, sources: torch.Tensor, sources_total: int, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`source_sums_reference`, in Triton where `runs_triton` says so.

    Raises:
        ValueError: losses, sources and mask are not of one shape.
    """
    if sources.shape != losses.shape or (mask is not None and mask.shape != losses.shape):
        raise ValueError(
            f"losses are {tuple(losses.shape)}: sources {tuple(sources.shape)} and the mask must be as well"
        )
    if not runs_triton(losses, sources):
        return source_sums_reference(losses, sources, sources_total, mask)
    sums = torch.empty(sources_total, dtype=torch.float32, device=losses.device)
    counts = torch.empty(sources_total, dtype=torch.int64, device=losses.device)
    launch = launch_for("source_sums", losses.numel(), 4, losses.device)
    if sources_total:
        _sums_kernel[(sources_total,)](
            losses.detach().float().flatten(),
            sources.flatten(),
            None if mask is None else (mask != 0).flatten().view(torch.uint8),
            sums,
            counts,
            losses.numel(),
            BLOCK=launch.block,
            num_warps=launch.warps,
        )
    return sums, counts
