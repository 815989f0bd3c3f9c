"""Rotary position embedding (Su et al., arXiv 2104.09864) in Megatron's layouts, sbhd and packed thd.

A pair (a, b) of a head at phases (f, g) becomes (a cos f - b sin f, b cos g + a sin g); the gradient of that is
(da cos f + db sin g, db cos g - da sin f). Pairs are (i, i + R/2), or neighbours (2i, 2i + 1) when interleaved, of the
R leading columns that the phases cover; other columns pass. Megatron's phases are equal within a pair, but need not be.
megatron-core rounds the cosine, the sine and each product to the tensors' dtype; here arithmetic is fp32, rounded once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from megacpt_kernels.dispatch import runs_triton
from megacpt_kernels.launch import Launch, launch_for


@triton.jit
def _rotate_kernel(
    x_ptr: tl.tensor,  # [s, b, h, d], in, columns adjacent
    y_ptr: tl.tensor,  # [s, b, h, d], out, columns adjacent; may be x
    phases_ptr: tl.tensor,  # [places, 1 or b, R] fp32, in
    positions_ptr: tl.tensor,  # [s] int32 or int64, in: row of phases; None: the place in the sequence
    batch: int,
    heads: int,
    pairs: int,
    rest: int,  # columns to copy behind the pairs
    mscale: float,
    x_s: int,
    x_b: int,
    x_h: int,
    y_s: int,
    y_b: int,
    y_h: int,
    phases_s: int,
    phases_b: int,  # 0: all samples have the same phases
    INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,  # 0: nothing to copy
) -> None:
    token = tl.program_id(0).to(tl.int64)
    place = token // batch
    sample = token % batch
    pair = tl.arange(0, PAIRS)
    first = pair * 2 if INTERLEAVED else pair
    second = first + 1 if INTERLEAVED else first + pairs
    position = place
    if positions_ptr is not None:
        position = tl.load(positions_ptr + place).to(tl.int64)
    phases_ptr += position * phases_s + sample * phases_b
    first_phase = tl.load(phases_ptr + first, mask=pair < pairs, other=0.0).to(tl.float32)
    second_phase = tl.load(phases_ptr + second, mask=pair < pairs, other=0.0).to(tl.float32)
    first_cos = (tl.cos(first_phase) * mscale)[None, :]
    second_cos = (tl.cos(second_phase) * mscale)[None, :]
    first_sin = (tl.sin(first_phase) * mscale)[None, :]
    second_sin = (tl.sin(second_phase) * mscale)[None, :]
    if BACKWARD:
        first_sin, second_sin = -second_sin, -first_sin
    x_ptr += place * x_s + sample * x_b
    y_ptr += place * y_s + sample * y_b
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        inside = (head < heads) & (pair < pairs)[None, :]
        a = tl.load(x_ptr + head * x_h + first[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + head * x_h + second[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + head * y_h + first[None, :], a * first_cos - b * first_sin, mask=inside)
        tl.store(y_ptr + head * y_h + second[None, :], b * second_cos + a * second_sin, mask=inside)
        if REST:
            column = tl.arange(0, REST)[None, :]
            passing = (head < heads) & (column < rest)
            kept = tl.load(x_ptr + head * x_h + 2 * pairs + column, mask=passing, other=0.0)
            tl.store(y_ptr + head * y_h + 2 * pairs + column, kept, mask=passing)


def rotate(
    x: torch.Tensor,
    y: torch.Tensor,
    phases: torch.Tensor,
    positions: torch.Tensor | None,
    *,
    interleaved: bool,
    mscale: float,
    backward: bool,
    launch: Launch | None = None,
) -> None:
    """Triton's rotation of x [s, b, h, d] into y (which may be x); `backward` transposes it.

    Args:
        phases: [places, 1 or b, R].
    """
    length, batch, heads, width = x.shape
    pairs = phases.shape[2] // 2
    rest = 0 if y.data_ptr() == x.data_ptr() else width - 2 * pairs
    padded = triton.next_power_of_2(pairs)
    launch = launch or launch_for("rope", width, x.element_size(), x.device)
    if not x.numel():
        return
    _rotate_kernel[(length * batch,)](
        x,
        y,
        phases,
        positions,
        batch,
        heads,
        pairs,
        rest,
        mscale,
        *x.stride()[:3],
        *y.stride()[:3],
        phases.stride(0),
        phases.stride(1) if phases.shape[1] > 1 else 0,
        INTERLEAVED=interleaved,
        BACKWARD=backward,
        HEADS=min(max(1, launch.block // padded), triton.next_power_of_2(heads)),
        PAIRS=padded,
        REST=triton.next_power_of_2(rest) if rest else 0,
        num_warps=launch.warps,
    )


def rotate_reference(
    x: torch.Tensor,
    phases: torch.Tensor,
    positions: torch.Tensor | None,
    *,
    interleaved: bool,
    mscale: float,
    backward: bool,
) -> torch.Tensor:
    """`rotate` in torch, into a new tensor: two passes over x, where `rope_reference` and its gradient take a dozen."""
    rotary = phases.shape[2]
    angles = (phases[: x.shape[0]] if positions is None else phases[positions])[:, :, None]
    cos, sin = angles.cos() * mscale, angles.sin() * mscale
    first, second = (
        (slice(0, rotary, 2), slice(1, rotary, 2))
        if interleaved
        else (slice(0, rotary // 2), slice(rotary // 2, rotary))
    )
    first_sin, second_sin = -sin[..., first], sin[..., second]
    if backward:
        first_sin, second_sin = second_sin, first_sin
    wide = x.float()
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    torch.mul(wide[..., :rotary], cos, out=y[..., :rotary])
    y[..., first].addcmul_(wide[..., second], first_sin)
    y[..., second].addcmul_(wide[..., first], second_sin)
    y[..., rotary:] = wide[..., rotary:]
    return y.to(x.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        phases: torch.Tensor,
        positions: torch.Tensor | None,
        interleaved: bool,
        mscale: float,
        in_place: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(phases, positions)
        ctx.options = {"interleaved": interleaved, "mscale": mscale}
        if in_place:
            ctx.mark_dirty(x)
        if not runs_triton(x, phases):
            rotated = rotate_reference(_as_sbhd(x), phases, positions, **ctx.options, backward=False).view(x.shape)
            return x.copy_(rotated) if in_place else rotated
        source = x if x.stride(-1) == 1 else x.contiguous()
        y = x if in_place else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rotate(_as_sbhd(source), _as_sbhd(y), phases, positions, **ctx.options, backward=False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        phases, positions = ctx.saved_tensors
        if not runs_triton(dy, phases):
            dx = rotate_reference(_as_sbhd(dy), phases, positions, **ctx.options, backward=True).view(dy.shape)
            return dx, None, None, None, None, None
        source = dy if dy.stride(-1) == 1 else dy.contiguous()
        dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
        rotate(_as_sbhd(source), _as_sbhd(dx), phases, positions, **ctx.options, backward=True)
        return dx, None, None, None, None, None


def _as_sbhd(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 4 else x.unsqueeze(1)


def rope_reference(
    x: torch.Tensor,
    phases: torch.Tensor,
    positions: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    mscale: float = 1.0,
) -> torch.Tensor:
    """Rotate the leading R columns of every head; fp32 inside, rounded once.

    Args:
        x: [s, b, h, d], or [t, h, d] of packed documents; fp32 or bf16.
        phases: Megatron's rotary embedding [places, 1, 1, R] fp32, R even and at most d. Angles in radians. With a
            second dimension of b, each sample has its own.
        positions: [s] or [t] integers, the row of `phases` for each token (`packed_positions`); None: its index.
        interleaved: pairs are neighbouring columns, not columns half of R apart.
        mscale: factor on cosine and sine (YaRN's; 1 otherwise).

    Returns:
        The shape and dtype of `x`.
    """
    angles = phases.float() if x.dim() == 4 else phases[:, 0].float()
    angles = angles[: x.shape[0]] if positions is None else angles[positions]
    wide = x[..., : angles.shape[-1]].float()
    a, b = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
    turned = torch.stack((-b, a), -1).flatten(-2) if interleaved else torch.cat((-b, a), -1)
    rotated = (wide * angles.cos() + turned * angles.sin()) * mscale
    return torch.cat((rotated.to(x.dtype), x[..., angles.shape[-1] :]), -1)


def rope(
    x: torch.Tensor,
    phases: torch.Tensor,
    positions: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    mscale: float = 1.0,
    in_place: bool = False,
) -> torch.Tensor:
    """`rope_reference`, in Triton where `runs_triton` says so.

    `x` may be a view with any strides, as the query of a fused projection is; the result is contiguous. With `in_place`
    the result is written over `x` and is `x`: autograd allows that where `x` is no leaf and no output of `split`.
    On a GPU positions are not checked against `phases`: that would wait for the device.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check(x, phases, positions)
    if in_place and x.stride(-1) != 1:
        raise ValueError("x can be rotated in place only if the columns of a head are adjacent in memory")
    angles = phases[:, :, 0]
    return _Rope.apply(
        x, angles if angles.stride(-1) == 1 else angles.contiguous(), positions, interleaved, mscale, in_place
    )


def packed_positions(
    cu_seqlens: torch.Tensor, tokens: int, *, cp_rank: int = 0, cp_size: int = 1, restart: bool = True
) -> torch.Tensor:
    """The position of each token of a packed [t, h, d] within its document, without waiting for the device.

    Under context parallelism a rank holds of every document part `cp_rank` and part `2 * cp_size - 1 - cp_rank` of
    2 * cp_size equal ones, as Megatron deals them. The same for all layers: compute it once for a batch.

    Args:
        cu_seqlens: [documents + 1] integers, cumulative lengths over all ranks, from 0; each a multiple of 2 * cp_size
            if cp_size > 1.
        tokens: t, this rank's tokens; those behind the last document get position 0.
        restart: count from 0 in each document; else in the whole pack, for phases that cover it.

    Returns:
        [t] int64 on the device of `cu_seqlens`.
    """
    starts = cu_seqlens.long()
    index = torch.arange(tokens, device=starts.device)
    document = (torch.searchsorted(starts[1:] // cp_size, index, right=True)).clamp(max=starts.numel() - 2)
    begin, length = starts[document], starts[document + 1] - starts[document]
    inside = index - begin // cp_size
    if cp_size > 1:
        part = length // (2 * cp_size)
        behind = inside >= part
        inside = inside + torch.where(behind, length - (cp_rank + 2) * part, cp_rank * part)
    position = inside if restart else inside + begin
    return torch.where(index < starts[-1] // cp_size, position, 0)


def _check(x: torch.Tensor, phases: torch.Tensor, positions: torch.Tensor | None) -> None:
    rotary = phases.shape[-1]
    samples = (1, x.shape[1]) if x.dim() == 4 else (1,)
    if x.dim() not in (3, 4) or phases.dim() != 4 or phases.shape[1] not in samples or phases.shape[2] != 1:
        raise ValueError(
            f"x is {tuple(x.shape)} and phases {tuple(phases.shape)}: rope takes [s, b, h, d] or [t, h, d], and phases "
            "of [places, 1, 1, R], equal for all heads, or of [places, b, 1, R]"
        )
    if rotary % 2 or rotary > x.shape[-1]:
        raise ValueError(f"phases cover {rotary} columns: that must be even and at most a head's {x.shape[-1]}")
    if positions is None and phases.shape[0] < x.shape[0]:
        raise ValueError(f"phases have {phases.shape[0]} places, x has {x.shape[0]}; give more phases, or positions")
    if positions is not None and positions.shape != x.shape[:1]:
        raise ValueError(
            f"positions are {tuple(positions.shape)}, but x has {x.shape[0]} tokens in its first dimension"
        )
