"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467): y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

With a residual, x + residual is what is normalised and is returned beside y, in one pass over both.

Gradients, with n = x * r, r = 1 / sqrt(mean(x^2) + eps), g = dy * weight: dx = r * (g - n * mean(g * n)), and
dweight = sum over rows of dy * n. Each program sums the rows it walks over in registers and writes one partial row; one
sum over those follows. No atomics, so the order of additions depends on the device's size only.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import FunctionCtx, once_differentiable

from megacpt_kernels.dispatch import as_rows, multiprocessors, runs_triton
from megacpt_kernels.launch import Launch, launch_for

MAX_WIDTH = 65536


@triton.jit
def _forward_kernel(
    x_ptr: tl.tensor,  # [rows, width], in
    residual_ptr: tl.tensor,  # [rows, width], in, or None
    weight_ptr: tl.tensor,  # [width], in
    y_ptr: tl.tensor,  # [rows, width] contiguous, out
    total_ptr: tl.tensor,  # [rows, width] contiguous, out: x + residual, or None
    scale_ptr: tl.tensor,  # [rows] fp32, out: 1 / root mean square
    rows: int,
    width: int,
    x_stride: int,
    residual_stride: int,
    eps: float,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows)[:, None] & (column < width)
    here = row[:, None] * width + column
    x = tl.load(x_ptr + row[:, None] * x_stride + column, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(total_ptr + here, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / width + eps)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(x_ptr.dtype.element_ty)
    normalised = (wide * scale[:, None]).to(x_ptr.dtype.element_ty)
    tl.store(y_ptr + here, normalised.to(tl.float32) * weight.to(tl.float32), mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr: tl.tensor,  # [rows, width], in
    dtotal_ptr: tl.tensor,  # [rows, width], in: gradient of x + residual from elsewhere, or None
    x_ptr: tl.tensor,  # [rows, width], in: what was normalised
    weight_ptr: tl.tensor,  # [width], in
    scale_ptr: tl.tensor,  # [rows] fp32, in
    dx_ptr: tl.tensor,  # [rows, width] contiguous, out
    partial_ptr: tl.tensor,  # [programs, width] fp32, out: this program's rows of dweight
    rows: int,
    width: int,
    dy_stride: int,
    dtotal_stride: int,
    x_stride: int,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(x_ptr.dtype.element_ty)
    partial = tl.zeros((WIDTH,), tl.float32)
    for first in tl.range(program * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (column < width)
        x = tl.load(x_ptr + row[:, None] * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        normalised = x * scale
        scaled = dy * weight.to(tl.float32)
        mean = tl.sum(scaled * normalised, 1)[:, None] / width
        dx = scale * (scaled - normalised * mean)
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + row[:, None] * dtotal_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row[:, None] * width + column, dx, mask=inside)
        partial += tl.sum(dy * normalised.to(x_ptr.dtype.element_ty).to(tl.float32), 0)
    columns = tl.arange(0, WIDTH)
    tl.store(partial_ptr + program.to(tl.int64) * width + columns, partial, mask=columns < width)


def _tile(launch: Launch, width: int) -> tuple[int, int]:
    """Rows and (padded) columns that a program holds."""
    padded = triton.next_power_of_2(width)
    return max(1, launch.block // padded), padded


def rms_norm_forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, launch: Launch | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triton's forward on [rows, width]: y, what was normalised (x itself without a residual), 1 / root mean square."""
    rows, width = x.shape
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(y)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    launch = launch or launch_for("rms_norm_forward", width, x.element_size(), x.device)
    tile_rows, tile_width = _tile(launch, width)
    if rows:
        _forward_kernel[(triton.cdiv(rows, tile_rows),)](
            x,
            residual,
            weight,
            y,
            total,
            scale,
            rows,
            width,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            ROWS=tile_rows,
            WIDTH=tile_width,
            num_warps=launch.warps,
        )
    return y, x if total is None else total, scale


def rms_norm_backward(
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton's backward on [rows, width]: the gradients of what was normalised and of the weight."""
    rows, width = x.shape
    launch = launch or launch_for("rms_norm_backward", width, x.element_size(), x.device)
    tile_rows, tile_width = _tile(launch, width)
    programs = max(1, min(triton.cdiv(rows, tile_rows), multiprocessors(x.device) * launch.per_sm))
    dx = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    partial = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        dy,
        dtotal,
        x,
        weight,
        scale,
        dx,
        partial,
        rows,
        width,
        dy.stride(0),
        0 if dtotal is None else dtotal.stride(0),
        x.stride(0),
        ROWS=tile_rows,
        WIDTH=tile_width,
        STAGES=launch.stages,
        num_warps=launch.warps,
    )
    return dx, partial.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows = as_rows(x)
        if runs_triton(rows, weight):
            y, _, scale = rms_norm_forward(rows, None, weight, eps)
        else:
            y, scale = rms_norm_forward_reference(rows, weight, eps)
        ctx.save_for_backward(rows, weight, scale)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        if runs_triton(x, weight):
            dx, dweight = rms_norm_backward(as_rows(dy), None, x, weight, scale)
        else:
            dx, dweight = rms_norm_backward_reference(as_rows(dy), x, weight, scale)
        return dx.view(dy.shape), dweight, None


class _RMSNormResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, total, scale = rms_norm_forward(as_rows(x), as_rows(residual), weight, eps)
        ctx.save_for_backward(total, weight, scale)
        return y.view(x.shape), total.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, dy: torch.Tensor, dtotal: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        total, weight, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        dx, dweight = rms_norm_backward(as_rows(dy), as_rows(dtotal), total, weight, scale)
        dx = dx.view(dy.shape)
        return dx, dx, dweight, None


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise in fp32, round once to the input's dtype, then scale, as Llama does.

    Args:
        x: [..., H], fp32 or bf16.
        weight: [H], any floating dtype.
        eps: added to the mean square.

    Returns:
        [..., H] in the dtype of `x`.
    """
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight.to(x.dtype)


def rms_norm_forward_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm_forward` without a residual, in torch: [rows, width] to y and 1 / root mean square."""
    wide = x.float()
    scale = (torch.linalg.vector_norm(wide, dim=1).square_() / x.shape[1] + eps).rsqrt_()
    return (wide * scale[:, None]).to(x.dtype).mul_(weight.to(x.dtype)), scale


def rms_norm_backward_reference(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm_backward` in torch. Sums over rows and columns are matrix-vector products: one pass each."""
    dy, wide, w = dy.float(), x.float(), weight.float()
    product = dy * wide
    dweight = scale @ product
    shift = (product @ w) * scale.pow(3) / -x.shape[1]
    dx = torch.mul(dy, w, out=product).mul_(scale[:, None]).addcmul_(wide, shift[:, None])
    return dx.to(x.dtype), dweight.to(weight.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm_reference`, in Triton where `runs_triton` says so.

    Raises:
        ValueError: a weight that is not [H], or in Triton an H beyond 65,536.
    """
    _check(x, weight)
    return _RMSNorm.apply(x, weight, eps)


def rms_norm_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`total = x + residual` rounded to their dtype, and its RMSNorm: (y, total), both [..., H].

    Raises:
        ValueError: as `rms_norm`; or `residual` is not of the shape and dtype of `x`.
    """
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}, x is {x.dtype} {tuple(x.shape)}")
    if runs_triton(x, residual, weight):
        y, total = _RMSNormResidual.apply(x, residual, weight, eps)
        return y, total
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)}, but x is {tuple(x.shape)}: weight has x's last dimension")
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"rows of {x.shape[-1]} elements: a program holds a row, of at most {MAX_WIDTH}")
