"""Offsets beyond 2^31 elements: rows of a real tensor so far apart, of whose memory only they are ever touched."""

import mmap

import pytest
import torch
import triton
import triton.language as tl

from megacpt_kernels.cross_entropy import cross_entropy_reference, vocab_parallel_cross_entropy
from megacpt_kernels.dispatch import INTERPRETED
from megacpt_kernels.rmsnorm import rms_norm, rms_norm_reference
from megacpt_kernels.rope import rope, rope_reference
from megacpt_kernels.swiglu import swiglu, swiglu_reference

WIDTH, ROWS, APART = 24, 4, 2**30
MAP_NORESERVE = 0x4000  # Linux; Python 3.12 does not name it


@triton.jit
def copy_rows_in_32_bits(x_ptr, y_ptr, stride, WIDTH: tl.constexpr):
    column = tl.arange(0, 32)
    row = tl.program_id(0)
    value = tl.load(x_ptr + row * stride + column, mask=column < WIDTH)
    tl.store(y_ptr + row * WIDTH + column, value, mask=column < WIDTH)


@pytest.fixture
def far() -> torch.Tensor:
    """[4, 24] bf16 with 2^30 elements from row to row; what lies 2^32 elements off, where 32 bits wrap to, is 0."""
    if not INTERPRETED:
        pytest.skip("needs the interpreter; on a GPU, test_more_than_2_31_logits")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    behind = 2**31
    memory = mmap.mmap(-1, 2 * (behind + (ROWS - 1) * APART + WIDTH), flags=flags)
    x = torch.frombuffer(memory, dtype=torch.bfloat16)[behind:].as_strided((ROWS, WIDTH), (APART, 1), behind)
    x.copy_(torch.randn(ROWS, WIDTH))
    return x


def test_the_interpreter_wraps_as_a_gpu_does(far: torch.Tensor) -> None:
    y = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16)
    copy_rows_in_32_bits[(ROWS,)](far, y, far.stride(0), WIDTH=WIDTH)
    assert torch.equal(y[:2], far[:2])
    assert (y[2:] == 0).all()


def values_and_gradient(function, x: torch.Tensor) -> list[torch.Tensor]:
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaf)]


def test_rows_far_apart(far: torch.Tensor, small_launches: None) -> None:
    weight, phases = torch.randn(WIDTH).bfloat16(), torch.randn(ROWS, 1, 1, 8)
    pairs = [
        (lambda x: rms_norm(x, weight, 1e-5), lambda x: rms_norm_reference(x, weight, 1e-5)),
        (swiglu, swiglu_reference),
        (lambda x: rope(x.unflatten(1, (3, 8)), phases), lambda x: rope_reference(x.unflatten(1, (3, 8)), phases)),
    ]
    for ours, reference in pairs:
        for got, wanted in zip(
            values_and_gradient(ours, far), values_and_gradient(reference, far.contiguous()), strict=True
        ):
            torch.testing.assert_close(got.float(), wanted.float(), rtol=2e-2, atol=2e-2)


def test_gradients_come_from_and_go_to_rows_far_apart(far: torch.Tensor, small_launches: None) -> None:
    targets = torch.arange(ROWS)
    before = far.clone(memory_format=torch.contiguous_format)
    losses = vocab_parallel_cross_entropy(far.requires_grad_(), targets, real_rows=21)
    expected = cross_entropy_reference(before.requires_grad_(), targets, real_rows=21)
    torch.testing.assert_close(losses, expected)
    (gradient,) = torch.autograd.grad(losses.sum(), far)
    expected.sum().backward()
    assert gradient.data_ptr() == far.data_ptr()
    torch.testing.assert_close(far.detach().float(), before.grad.float(), rtol=2e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_2_31_logits() -> None:
    torch.use_deterministic_algorithms(False)  # which would fill gigabytes with NaN
    rows, columns = 20_000, 131_072
    logits = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(columns, (rows,), device="cuda")
    some = [0, 16_383, 16_384, 16_385, rows - 1]
    before = logits[some].clone().requires_grad_()
    leaf = logits.requires_grad_()
    losses = vocab_parallel_cross_entropy(leaf, targets)
    expected = cross_entropy_reference(before, targets[some])
    torch.testing.assert_close(losses[some], expected, rtol=1e-5, atol=1e-5)
    losses.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(leaf.grad[some].float(), before.grad.float(), rtol=1e-2, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("ours", "reference"), [(rms_norm, rms_norm_reference), (swiglu, swiglu_reference)])
def test_more_than_2_31_activations(ours, reference) -> None:
    torch.use_deterministic_algorithms(False)
    others = (torch.ones(8192, device="cuda"), 1e-5) if ours is rms_norm else ()
    x = torch.randn(2**31 // 8192 + 5, 8192, device="cuda", dtype=torch.bfloat16).requires_grad_()
    some = [0, x.shape[0] // 2, x.shape[0] - 5, x.shape[0] - 1]
    y = ours(x, *others)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    few = x.detach()[some].requires_grad_()
    expected = reference(few, *others)
    (dfew,) = torch.autograd.grad(expected, few, torch.ones_like(expected))
    torch.testing.assert_close(y[some].float(), expected.float(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(dx[some].float(), dfew.float(), rtol=1e-2, atol=1e-2)
