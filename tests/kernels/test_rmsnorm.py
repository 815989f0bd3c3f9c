"""RMSNorm: the reference against float64 arithmetic, all gradients included."""

import pytest
import torch

from megacpt_kernels.rmsnorm import rms_norm, rms_norm_reference


def double(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 7), (5, 1, 192), (2, 3, 1000)])
@pytest.mark.parametrize("function", [rms_norm, rms_norm_reference])
def test_values_and_gradients(shape: tuple[int, ...], function) -> None:
    torch.manual_seed(0)
    x, weight, upstream = torch.randn(shape), torch.randn(shape[-1:]), torch.randn(shape)
    results = []
    for of, dtype in ((double, torch.float64), (function, torch.float32)):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, weight)]
        output = of(*inputs, 1e-5)
        output.backward(upstream.to(dtype))
        results.append([output.detach(), *(tensor.grad for tensor in inputs)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


def test_bf16_is_rounded_once_before_the_scale() -> None:
    x, weight = torch.randn(4, 64).bfloat16(), torch.rand(64).bfloat16()
    expected = double(x.double(), torch.ones(64).double(), 1e-5).bfloat16() * weight
    assert torch.equal(rms_norm_reference(x, weight, 1e-5), expected)
