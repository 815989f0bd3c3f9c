"""Linear cross-entropy on one rank: the whole logits in float64, chunks, both forms, Megatron's `main_grad`."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megacpt_kernels.linear_cross_entropy import (
    HeadOptions,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_cross_entropy_sum,
)
from tests.kernels.compare import FLOATS, TOLERANCE, assert_close, run
from tests.kernels.test_cross_entropy import double

TOKENS, HIDDEN, COLUMNS, REAL = 14, 12, 50, 45


@pytest.fixture
def case(device: str) -> dict[str, torch.Tensor]:
    return {
        "hidden": torch.randn(7, 2, HIDDEN, device=device),
        "weight": torch.randn(COLUMNS, HIDDEN, device=device),
        "targets": torch.randint(REAL, (7, 2), device=device),
        "mask": torch.rand(7, 2, device=device) > 0.3,
    }


def of_rows(rows: int, dtype: torch.dtype = torch.float32) -> HeadOptions:
    return HeadOptions(chunk_bytes=rows * COLUMNS * dtype.itemsize)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 4, TOKENS])
def test_values_and_gradients(case, dtype: torch.dtype, rows: int, small_launches: None) -> None:
    targets, mask = case["targets"], case["mask"]
    inputs = [case["hidden"].to(dtype), case["weight"].to(dtype)]
    expected = run(lambda h, w: double(h @ w.t(), targets, mask, REAL), inputs, torch.float64)
    options = of_rows(rows, dtype)
    results = run(lambda h, w: linear_cross_entropy(h, w, targets, mask, real_rows=REAL, options=options), inputs)
    assert [result.dtype for result in results] == [torch.float32, dtype, dtype]
    assert_close(results, expected, TOLERANCE[dtype])
    reference = run(lambda h, w: linear_cross_entropy_reference(h, w, targets, mask, real_rows=REAL), inputs)
    assert_close(reference, expected, TOLERANCE[dtype])
    assert (results[2][REAL:] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [4, TOKENS])
def test_the_sum_and_its_gradients(case, dtype: torch.dtype, rows: int, small_launches: None) -> None:
    targets, weights = case["targets"], case["mask"] * torch.rand(7, 2, device=case["mask"].device)
    inputs = [case["hidden"].to(dtype), case["weight"].to(dtype)]

    def whole(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (double(h @ w.t(), targets, weights > 0, REAL) * weights).sum()

    def ours(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        total, losses = linear_cross_entropy_sum(h, w, targets, weights, real_rows=REAL, options=of_rows(rows, dtype))
        assert not losses.requires_grad
        assert_close([losses], [double(h.double() @ w.double().t(), targets, weights > 0, REAL)], TOLERANCE[dtype])
        return total

    assert_close(run(ours, inputs), run(whole, inputs, torch.float64), TOLERANCE[dtype])


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, list | tuple) else [result]:
            if isinstance(value, torch.Tensor):
                self.nbytes = max(self.nbytes, value.nbytes)
        return result


@pytest.mark.parametrize("form", [linear_cross_entropy, linear_cross_entropy_sum])
def test_full_logits_never_exist(device: str, form) -> None:
    hidden = torch.randn(64, HIDDEN, device=device, requires_grad=True)
    weight = torch.randn(COLUMNS, HIDDEN, device=device, requires_grad=True)
    targets, ones = torch.randint(COLUMNS, (64,), device=device), torch.ones(64, device=device)
    with Largest() as largest:
        result = form(hidden, weight, targets, ones, options=of_rows(8))
        (result if form is linear_cross_entropy else result[0]).sum().backward()
    assert largest.nbytes <= 4 * max(64 * HIDDEN, COLUMNS * HIDDEN, 8 * COLUMNS) < 4 * 64 * COLUMNS
    whole = linear_cross_entropy_reference(hidden, weight, targets).sum()
    assert_close([hidden.grad, weight.grad], torch.autograd.grad(whole, [hidden, weight]), 1e-5)


@pytest.fixture(params=[linear_cross_entropy, linear_cross_entropy_sum])
def loss(request, case) -> Iterator:
    def summed(hidden: torch.Tensor, weight: torch.Tensor, options: HeadOptions) -> torch.Tensor:
        arguments = (hidden, weight, case["targets"], case["mask"])
        result = request.param(*arguments, real_rows=REAL, options=options)
        return 2 * (result if request.param is linear_cross_entropy else result[0]).sum()

    return summed


@pytest.mark.parametrize(
    ("dtype", "main", "zero_out"),
    [
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, False),
    ],
)
def test_the_gradient_is_added_to_main_grad(case, loss, dtype: torch.dtype, main: torch.dtype, zero_out: bool) -> None:
    hidden, weight = case["hidden"].to(dtype), torch.nn.Parameter(case["weight"].to(dtype))
    (expected,) = torch.autograd.grad(loss(hidden, weight, of_rows(4, dtype)), weight)
    before = torch.randn(COLUMNS, HIDDEN, device=weight.device).to(main)
    weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = before.clone(), False, zero_out
    options = HeadOptions(chunk_bytes=4 * COLUMNS * dtype.itemsize, fuse_main_grad=True)
    loss(hidden, weight, options).backward()
    assert weight.grad_added_to_main_grad
    assert weight.grad.shape == weight.shape
    assert not zero_out or (weight.grad == 0).all()
    assert_close([weight.main_grad], [before.float() + expected.float()], TOLERANCE[dtype])


def test_only_what_is_wanted_gets_a_gradient(case, loss) -> None:
    hidden, weight = case["hidden"], case["weight"]
    expected = torch.autograd.grad(loss(hidden.requires_grad_(), weight.requires_grad_(), of_rows(4)), [hidden, weight])
    (alone,) = torch.autograd.grad(loss(hidden, weight.detach(), of_rows(4)), [hidden])
    assert_close([alone], expected[:1], 1e-6)
    (alone,) = torch.autograd.grad(loss(hidden.detach(), weight, of_rows(4)), [weight])
    assert_close([alone], expected[1:], 1e-6)
    with torch.no_grad():
        assert_close([loss(hidden, weight, of_rows(4))], [loss(hidden, weight, of_rows(4)).detach()], 1e-6)


def test_what_does_not_belong_together_is_refused(case) -> None:
    hidden, weight, targets = case["hidden"], case["weight"], case["targets"]
    with pytest.raises(ValueError, match="in the dtype of hidden"):
        linear_cross_entropy(hidden, weight.bfloat16(), targets)
    with pytest.raises(ValueError, match="one a token"):
        linear_cross_entropy_sum(hidden, weight, targets, torch.ones(3))
    with pytest.raises(ValueError, match=r"needs weight\.main_grad"):
        linear_cross_entropy(hidden, weight.requires_grad_(), targets, options=HeadOptions(fuse_main_grad=True))
    frozen = linear_cross_entropy(hidden, weight.detach(), targets, options=HeadOptions(fuse_main_grad=True))
    assert not frozen.requires_grad
