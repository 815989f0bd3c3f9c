"""The stages of a cross-entropy over a vocabulary that is spread over ranks, each in Triton and as a torch reference.

1. `statistics`: each rank reads its logits once: the maximum, the sum of exp(logit - maximum), the target's logit.
2. `gather`: the one collective, an all-gather of those three fp32 numbers a token.
3. `token_losses` (its own file): log-sum-exp over all ranks, the losses, masked, and their sums by source.
4. `logit_gradient_`: (softmax - onehot) * upstream, written over the logits.

Logits keep their dtype in memory; every number between a load and a store is fp32. The running maximum and sum are kept
per lane (Milakov and Gimelshein, arXiv 1805.02867) with one exponential an element: of exp(x - m) and exp(m - x) the
smaller one is exp(-|x - m|) and the other is not needed. Nothing crosses lanes until the row is read.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from megacpt_kernels.dispatch import runs_triton
from megacpt_kernels.launch import Launch, launch_for

SLICE_BYTES = 1 << 20
"""Logits that a reference works on at a time."""
LOWEST = -3.0e38
"""Start of a maximum: finite, so that a difference of two is 0, and below every logit that counts."""


@dataclass(frozen=True)
class Shard:
    """This rank's part of the vocabulary.

    `columns` of the logits, of which the first `real` are tokens `first`, `first + 1`, ... and the rest is padding, as
    Megatron deals a padded vocabulary over `group` (None: one rank holds everything).
    """

    columns: int
    real: int
    first: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, columns: int, real_rows: int | None, group: dist.ProcessGroup | None) -> "Shard":
        """The shard of this rank of `group`; `real_rows` None: no padding.

        Raises:
            ValueError: more real rows than columns.
        """
        real = columns if real_rows is None else real_rows
        if not 0 <= real <= columns:
            raise ValueError(f"real_rows is {real}, but this rank has {columns} columns of logits")
        return cls(columns, real, 0 if group is None else dist.get_rank(group) * columns, group)


@triton.jit
def _add_exponential(maximum: tl.tensor, total: tl.tensor, logit: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """A lane's maximum, and its sum of exp(x - maximum), with one more x."""
    smaller = tl.exp(-tl.abs(logit - maximum))
    total = tl.where(logit > maximum, total * smaller + 1, total + smaller)
    return tl.maximum(maximum, logit), total


@triton.jit
def _statistics_kernel(
    logits_ptr: tl.tensor,  # [rows, columns], in
    targets_ptr: tl.tensor,  # [rows] integers, in
    statistics_ptr: tl.tensor,  # [3, rows] fp32, out: maximum, sum, target's logit (-inf: not on this rank)
    rows: int,
    columns: int,
    real: int,
    first: int,
    stride: int,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    maximum = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    whole = real // BLOCK * BLOCK
    # Without a mask, whose end at any `real` would make these loads of single elements.
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        logit = tl.load(logits_ptr + start + tl.arange(0, BLOCK)).to(tl.float32)
        maximum, total = _add_exponential(maximum, total, logit)
    if whole < real:
        column = whole + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + column, mask=column < columns, other=LOWEST).to(tl.float32)
        maximum, total = _add_exponential(maximum, total, tl.where(column < real, logit, LOWEST))
    highest = tl.max(maximum, 0)
    target = tl.load(targets_ptr + row).to(tl.int64) - first
    held = (target >= 0) & (target < real)
    tl.store(statistics_ptr + row, highest)
    tl.store(statistics_ptr + rows + row, tl.sum(total * tl.exp(maximum - highest), 0))
    wanted = tl.load(logits_ptr + target, mask=held, other=float("-inf")).to(tl.float32)
    tl.store(statistics_ptr + 2 * rows + row, wanted)


@triton.jit
def _gradient_kernel(
    logits_ptr: tl.tensor,  # [rows, columns], in and out
    targets_ptr: tl.tensor,  # [rows] integers, in
    normaliser_ptr: tl.tensor,  # [rows] fp32, in
    upstream_ptr: tl.tensor,  # [rows] fp32, in; 0 leaves zeros, whatever the logits are
    columns: int,
    real: int,
    first: int,
    stride: int,
    blocks: int,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    logits_ptr += row * stride
    upstream = tl.load(upstream_ptr + row)
    if upstream == 0:
        zeros = tl.zeros((BLOCK,), tl.float32)
        tl.store(logits_ptr + column, zeros, mask=column < columns)
    else:
        target = tl.load(targets_ptr + row).to(tl.int64) - first
        normaliser = tl.load(normaliser_ptr + row)
        logit = tl.load(logits_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        probability = tl.exp(logit - normaliser) - (column == target).to(tl.float32)
        gradient = tl.where(column < real, probability * upstream, 0.0)
        tl.store(logits_ptr + column, gradient, mask=column < columns)


def _slices(logits: torch.Tensor) -> list[slice]:
    """Rows in parts of about SLICE_BYTES of fp32, at least one part: a reference's copies stay in the cache."""
    rows = max(1, SLICE_BYTES // (4 * max(1, logits.shape[1])))
    return [slice(start, start + rows) for start in range(0, max(1, logits.shape[0]), rows)]


def statistics(logits: torch.Tensor, targets: torch.Tensor, shard: Shard, launch: Launch | None = None) -> torch.Tensor:
    """[rows, columns] logits and [rows] targets to [3, rows] fp32: maximum, sum of exp, target's logit or -inf."""
    if not runs_triton(logits, targets):
        parts = [statistics_reference(logits[part], targets[part], shard) for part in _slices(logits)]
        return torch.cat(parts, 1)
    rows = logits.shape[0]
    result = torch.empty((3, rows), dtype=torch.float32, device=logits.device)
    launch = launch or launch_for("cross_entropy_statistics", shard.columns, logits.element_size(), logits.device)
    if rows:
        _statistics_kernel[(rows,)](
            logits,
            targets,
            result,
            rows,
            shard.columns,
            shard.real,
            shard.first,
            logits.stride(0),
            LOWEST=LOWEST,
            BLOCK=launch.block,
            STAGES=launch.stages,
            num_warps=launch.warps,
        )
    return result


def statistics_reference(logits: torch.Tensor, targets: torch.Tensor, shard: Shard) -> torch.Tensor:
    """`statistics` in torch."""
    real = logits[:, : shard.real]
    highest = real.amax(1).float() if shard.real else torch.full(logits.shape[:1], LOWEST, device=logits.device)
    held, column = _held(targets, shard)
    wanted = torch.full_like(highest, -torch.inf)
    wanted[held] = real[held, column].float()
    # bf16 minus fp32 would widen a copy of the logits beside the result.
    below = real - highest[:, None] if real.dtype is torch.float32 else real.float().sub_(highest[:, None])
    return torch.stack((highest, below.exp_().sum(1), wanted))


def softmax_statistics_(logits: torch.Tensor, targets: torch.Tensor, shard: Shard) -> torch.Tensor:
    """`statistics` of fp32 logits in torch, which leave in their place each row's softmax over this rank's columns.

    A gradient then needs no second exponential. The largest probability is one over the sum of exp.
    """
    local = torch.empty((3, logits.shape[0]), dtype=torch.float32, device=logits.device)
    held, column = _held(targets, shard)
    local[2] = -torch.inf
    local[2, held] = logits[held, column]
    if not shard.real:
        local[0], local[1] = LOWEST, 0.0
        logits.zero_()
        return local
    logits[:, shard.real :] = -torch.inf
    torch.amax(logits, 1, out=local[0])
    if logits.is_contiguous():
        torch.softmax(logits, 1, out=logits)
    else:
        logits.copy_(torch.softmax(logits, 1))
    torch.amax(logits, 1, out=local[1]).reciprocal_()
    return local


def softmax_gradient_(
    probabilities: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor, upstream: torch.Tensor, shard: Shard
) -> None:
    """`logit_gradient_` over what `softmax_statistics_` left.

    Args:
        scale: [rows], `upstream` times this rank's share of all ranks' sum of exp.
    """
    probabilities *= scale[:, None]
    held, column = _held(targets, shard)
    probabilities[held, column] -= upstream[held]
    probabilities[torch.where(upstream == 0)] = 0.0


def _held(targets: torch.Tensor, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows whose target is a token of this rank, and its column."""
    target = targets.long() - shard.first
    (held,) = torch.where((target >= 0) & (target < shard.real))
    return held, target[held]


def gather(local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[3, rows] of each rank as [ranks, 3, rows]: one all-gather, so that sums have one order on all ranks."""
    if group is None:
        return local[None]
    everybody = torch.empty((dist.get_world_size(group), *local.shape), dtype=local.dtype, device=local.device)
    dist.all_gather_into_tensor(everybody.flatten(0, 1), local, group=group)
    return everybody


def logit_gradient_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    normaliser: torch.Tensor,
    upstream: torch.Tensor,
    shard: Shard,
    launch: Launch | None = None,
) -> None:
    """Write (softmax - onehot) * upstream over [rows, columns] logits; 0 in padding and in rows of upstream 0."""
    if not runs_triton(logits, targets):
        for part in _slices(logits):
            logit_gradient_reference_(logits[part], targets[part], normaliser[part], upstream[part], shard)
        return
    launch = launch or launch_for("cross_entropy_gradient", shard.columns, logits.element_size(), logits.device)
    blocks = triton.cdiv(shard.columns, launch.block)
    if logits.numel():
        _gradient_kernel[(logits.shape[0] * blocks,)](
            logits,
            targets,
            normaliser,
            upstream,
            shard.columns,
            shard.real,
            shard.first,
            logits.stride(0),
            blocks,
            BLOCK=launch.block,
            num_warps=launch.warps,
        )


def logit_gradient_reference_(
    logits: torch.Tensor, targets: torch.Tensor, normaliser: torch.Tensor, upstream: torch.Tensor, shard: Shard
) -> None:
    """`logit_gradient_` in torch; fp32 logits need no copy."""
    real = logits[:, : shard.real]
    gradient = real.float().sub_(normaliser[:, None]).exp_()
    held, column = _held(targets, shard)
    gradient[held, column] -= 1.0
    gradient *= upstream[:, None]
    gradient[torch.where(upstream == 0)] = 0.0
    if gradient.dtype is not real.dtype:
        real.copy_(gradient)
    logits[:, shard.real :] = 0.0
