"""SwiGLU: torch in float64, and megatron-core's own operation."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

from megacpt_kernels.swiglu import swiglu, swiglu_reference
from tests.kernels.compare import FLOATS, TOLERANCE, assert_close, run


def double(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 2), (3, 2, 14), (1, 192), (7, 1, 96), (0, 8)])
def test_values_and_gradients(device: str, shape: tuple[int, ...], dtype: torch.dtype, small_launches: None) -> None:
    inputs = [3 * torch.randn(shape, device=device).to(dtype)]
    expected = run(double, inputs, torch.float64)
    for function in (swiglu, swiglu_reference):
        assert_close(run(function, inputs), expected, TOLERANCE[dtype])


def test_it_is_megatrons(device: str) -> None:
    inputs = [torch.randn(5, 2, 38, device=device)]
    assert_close(run(swiglu, inputs), run(lambda x: bias_swiglu_impl(x, None), inputs), 1e-5)


def test_large_gates_do_not_overflow(device: str) -> None:
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=device)
    inputs = [torch.cat((gate, torch.ones_like(gate)))[None]]
    assert_close(run(swiglu, inputs), run(double, inputs, torch.float64), 1e-5)


def test_strides_of_any_kind(device: str) -> None:
    wide = torch.randn(4, 5, 40, device=device)
    for view in (wide[..., 10:30], wide.transpose(0, 1), wide[..., ::2]):
        assert torch.equal(swiglu(view), swiglu(view.contiguous()))


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="gate and up side by side"):
        swiglu(torch.ones(2, 7))
