"""RMSNorm: float64 arithmetic and torch's own operation, every gradient, with and without a residual."""

import pytest
import torch
import torch.nn.functional as F

from megacpt_kernels.rmsnorm import rms_norm, rms_norm_reference, rms_norm_residual
from tests.kernels.compare import FLOATS, TOLERANCE, assert_close, run

SHAPES = [(1, 1, 1), (3, 2, 7), (1, 192), (29, 48), (2, 3, 1000), (0, 16)]


def double(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [torch.randn(shape, device=device).to(dtype), torch.randn(shape[-1:], device=device).to(dtype)]
    expected = run(lambda x, weight: double(x, weight, 1e-5), inputs, torch.float64)
    for function in (rms_norm, rms_norm_reference):
        results = run(lambda x, weight, of=function: of(x, weight, 1e-5), inputs)
        assert [result.dtype for result in results] == [dtype] * 3
        assert_close(results, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_residual_is_added_and_both_results_have_gradients(
    device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = [torch.randn(size, device=device).to(dtype) for size in (shape, shape, shape[-1:])]
    expected = run(lambda x, r, weight: (double(x + r, weight, 1e-5), x + r), inputs, torch.float64)
    results = run(lambda x, r, weight: rms_norm_residual(x, r, weight, 1e-5), inputs)
    assert_close(results, expected, TOLERANCE[dtype])


def test_it_is_torchs_own_rms_norm(device: str, small_launches: None) -> None:
    inputs = [torch.randn(9, 36, device=device), torch.randn(36, device=device)]
    expected = run(lambda x, weight: F.rms_norm(x, (36,), weight, 1e-5), inputs)
    assert_close(run(lambda x, weight: rms_norm(x, weight, 1e-5), inputs), expected, 1e-5)


def test_more_rows_than_all_programs_hold_at_once(device: str, small_launches: None) -> None:
    inputs = [torch.randn(67, 5, device=device), torch.randn(5, device=device)]
    expected = run(lambda x, weight: double(x, weight, 1e-5), inputs, torch.float64)
    assert_close(run(lambda x, weight: rms_norm(x, weight, 1e-5), inputs), expected, 1e-5)


def test_strides_of_any_kind(device: str) -> None:
    wide, weight = torch.randn(4, 5, 40, device=device), torch.randn(20, device=device)
    for view in (wide[..., 10:30], wide.transpose(0, 1)[..., :20], wide[..., ::2], wide[0, 0, :20].expand(3, 20)):
        inputs = [view, weight]
        expected = run(lambda x, weight: double(x, weight, 1e-5), inputs, torch.float64)
        # No equality: a row that is loaded otherwise is summed in another order.
        assert_close([rms_norm(view, weight, 1e-5)], [rms_norm(view.contiguous(), weight, 1e-5)], 1e-6)
        assert_close([rms_norm(view, weight, 1e-5)], expected[:1], 1e-5)


def test_bf16_is_rounded_once_before_the_scale() -> None:
    x, weight = torch.randn(4, 64).bfloat16(), torch.rand(64).bfloat16()
    expected = double(x.double(), torch.ones(64).double(), 1e-5).bfloat16() * weight
    assert torch.equal(rms_norm_reference(x, weight, 1e-5), expected)


def test_a_weight_in_fp32_beside_bf16(device: str) -> None:
    x, weight = torch.randn(6, 24, device=device).bfloat16(), torch.randn(24, device=device)
    y, dx, dweight = run(lambda x, weight: rms_norm(x, weight, 1e-5), [x, weight])
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    expected = run(lambda x, weight: double(x, weight, 1e-5), [x, weight], torch.float64)
    assert_close([y, dx, dweight], expected, TOLERANCE[torch.bfloat16])


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(ValueError, match="weight has x's last dimension"):
        rms_norm(torch.ones(2, 4), torch.ones(5), 1e-5)
    with pytest.raises(ValueError, match=r"residual is torch\.bfloat16"):
        rms_norm_residual(torch.ones(2, 4), torch.ones(2, 4).bfloat16(), torch.ones(4), 1e-5)
    with pytest.raises(ValueError, match="at most 65536"):
        rms_norm(torch.ones(1, 65537), torch.ones(65537), 1e-5)
