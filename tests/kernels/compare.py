"""What the kernel tests share: outputs and gradients of a function, how close they must be, and small launches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megacpt_kernels import rmsnorm, rope, swiglu, token_losses, vocabulary
from megacpt_kernels.launch import Launch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of the largest value. bf16 keeps 8 bits; Triton's interpreter cuts where a GPU rounds to nearest."""
FLOATS = (torch.float32, torch.bfloat16)


def use_small_launches(put: Callable[[Any, str, Any], object]) -> None:
    for module in (rmsnorm, rope, swiglu, token_losses, vocabulary):
        put(module, "launch_for", lambda *_: Launch(block=16, warps=1))


def run(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """Outputs of `function` on copies of the inputs in `dtype`, then the gradients under the same random upstream."""
    leaves = [value.detach().to(dtype or value.dtype).clone().requires_grad_() for value in inputs]
    results = function(*(leaf * 1 for leaf in leaves))  # not leaves, as a function may write over what it gets
    outputs = list(results) if isinstance(results, tuple) else [results]
    kept = [output.detach().clone() for output in outputs]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    return [*kept, *torch.autograd.grad(outputs, leaves, upstream)]


def assert_close(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float) -> None:
    """Every element finite, and off by at most `tolerance` of the largest expected one."""
    assert len(results) == len(expected)
    for got, wanted in zip(results, expected, strict=True):
        assert got.shape == wanted.shape
        assert got.isfinite().all()
        if wanted.numel():
            error = (got.double() - wanted.double()).abs().max().item()
            assert error <= tolerance * max(1.0, wanted.abs().max().item()), f"{error} of {wanted.abs().max().item()}"
