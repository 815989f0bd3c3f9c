"""SwiGLU (Shazeer, arXiv 2002.05202) on a fused projection: y = gate * sigmoid(gate) * up.

The last dimension of the input is [gate | up], Megatron's order (`linear_fc1` with `gated_linear_unit`). Arithmetic in
fp32, rounded once. With s = sigmoid(gate): dup = dy * gate * s, dgate = dy * up * s * (1 + gate * (1 - s)).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.autograd.function import FunctionCtx, once_differentiable

from megacpt_kernels.dispatch import as_rows, runs_triton
from megacpt_kernels.launch import Launch, launch_for


@triton.jit
def _forward_kernel(
    x_ptr: tl.tensor,  # [rows, 2 * width], in: gate, then up
    y_ptr: tl.tensor,  # [rows, width] contiguous, out
    width: int,
    x_stride: int,
    blocks: int,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + column, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr: tl.tensor,  # [rows, width], in
    x_ptr: tl.tensor,  # [rows, 2 * width], in: gate, then up
    dx_ptr: tl.tensor,  # [rows, 2 * width] contiguous, out
    width: int,
    dy_stride: int,
    x_stride: int,
    blocks: int,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + width + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    tl.store(dx_ptr + row * 2 * width + column, dy * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=inside)
    tl.store(dx_ptr + row * 2 * width + width + column, dy * gate * sigmoid, mask=inside)


def swiglu_forward(x: torch.Tensor, launch: Launch | None = None) -> torch.Tensor:
    """Triton's forward on [rows, 2 * width]."""
    rows, width = x.shape[0], x.shape[1] // 2
    launch = launch or launch_for("swiglu_forward", width, x.element_size(), x.device)
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(width, launch.block)
    if rows:
        _forward_kernel[(rows * blocks,)](x, y, width, x.stride(0), blocks, BLOCK=launch.block, num_warps=launch.warps)
    return y


def swiglu_backward(dy: torch.Tensor, x: torch.Tensor, launch: Launch | None = None) -> torch.Tensor:
    """Triton's backward on [rows, width] and [rows, 2 * width]: the gradient of the latter."""
    rows, width = dy.shape
    launch = launch or launch_for("swiglu_backward", width, x.element_size(), x.device)
    dx = torch.empty((rows, 2 * width), dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(width, launch.block)
    if rows:
        _backward_kernel[(rows * blocks,)](
            dy, x, dx, width, dy.stride(0), x.stride(0), blocks, BLOCK=launch.block, num_warps=launch.warps
        )
    return dx


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        rows = as_rows(x)
        ctx.save_for_backward(rows)
        forward = swiglu_forward if runs_triton(rows) else swiglu_reference
        return forward(rows).view(*x.shape[:-1], x.shape[-1] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        backward = swiglu_backward if runs_triton(x) else swiglu_backward_reference
        return backward(as_rows(dy), x).view(*dy.shape[:-1], x.shape[1])


def swiglu_reference(x: torch.Tensor) -> torch.Tensor:
    """[..., 2 * F], gate then up, to [..., F] in the same dtype; fp32 inside."""
    gate, up = x.float().chunk(2, -1)
    return (F.silu(gate) * up).to(x.dtype)


def swiglu_backward_reference(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`swiglu_backward` in torch, in four passes; each half of the result is written where it belongs."""
    dy, wide = dy.float(), x.float()
    (gate, up), dx = wide.chunk(2, -1), torch.empty_like(wide)
    dgate, dup = dx.chunk(2, -1)
    torch.mul(F.silu(gate), dy, out=dup)
    torch.mul(dy, up, out=dgate)
    torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    return dx.to(x.dtype)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """`swiglu_reference`, in Triton where `runs_triton` says so; only `x` is kept for backward.

    Raises:
        ValueError: the last dimension is odd or empty.
    """
    if x.shape[-1] % 2 or not x.shape[-1]:
        raise ValueError(f"the last dimension is gate and up side by side, so even and not empty, not {x.shape[-1]}")
    return _SwiGLU.apply(x)
