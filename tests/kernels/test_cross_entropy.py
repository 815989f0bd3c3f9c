"""Cross-entropy on one rank: torch's in float64, padding, masks, what is written over the logits, extreme logits."""

from random import Random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpt_kernels import vocabulary
from megacpt_kernels.cross_entropy import cross_entropy_reference, vocab_parallel_cross_entropy
from megacpt_kernels.launch import Launch
from tests.kernels.compare import FLOATS, TOLERANCE, assert_close, run


def double(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, real: int) -> torch.Tensor:
    losses = F.cross_entropy(logits[..., :real].flatten(0, -2), targets.where(mask, 0).flatten(), reduction="none")
    return losses.view(targets.shape).where(mask, 0.0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "real"),
    [((1, 1), 1), ((1, 3), 2), ((3, 2, 50), 45), ((7, 16), 16), ((2, 64), 48), ((5, 33), 33), ((0, 9), 9)],
)
@pytest.mark.parametrize("small", [True, False])
def test_values_and_gradients(request, device: str, shape, real: int, dtype: torch.dtype, small: bool) -> None:
    if small:
        request.getfixturevalue("small_launches")
    logits = (4 * torch.randn(shape, device=device)).to(dtype)
    targets = torch.randint(real, shape[:-1], device=device)
    mask = torch.rand(shape[:-1], device=device) > 0.3
    expected = run(lambda x: double(x, targets, mask, real), [logits], torch.float64)
    for function in (vocab_parallel_cross_entropy, cross_entropy_reference):
        losses, gradient = run(lambda x, of=function: of(x, targets, mask, real_rows=real), [logits])
        assert (losses.dtype, gradient.dtype) == (torch.float32, dtype)
        assert_close([losses], expected[:1], 1e-5)
        assert_close([gradient], expected[1:], TOLERANCE[dtype])
        assert (gradient[..., real:] == 0).all()
        assert (gradient[~mask] == 0).all()


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 70), st.integers(0, 20), st.sampled_from([1, 4, 32]), st.randoms())
def test_any_width_and_any_block(rows: int, real: int, padding: int, block: int, random: Random) -> None:
    generator = torch.Generator().manual_seed(random.randrange(2**32))
    logits = 30 * torch.randn(rows, real + padding, generator=generator)
    logits[:, real:] = torch.nan
    targets, mask = torch.randint(real, (rows,), generator=generator), torch.ones(rows, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "launch_for", lambda *_: Launch(block, 1))
        results = run(lambda x: vocab_parallel_cross_entropy(x, targets, real_rows=real), [logits])
    assert_close(results, run(lambda x: double(x, targets, mask, real), [logits], torch.float64), 1e-5)


def test_the_gradient_is_written_over_the_logits_once(device: str) -> None:
    leaf = torch.randn(4, 10, device=device, requires_grad=True)
    logits = leaf * 1
    losses = vocab_parallel_cross_entropy(logits, torch.arange(4, device=device))
    (gradient,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_somebody_else_who_kept_the_logits_is_told(device: str) -> None:
    logits = torch.randn(4, 10, device=device, requires_grad=True) * 1
    squared = logits.square().sum()
    vocab_parallel_cross_entropy(logits, torch.arange(4, device=device)).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


def test_losses_are_the_same_with_and_without_a_gradient(device: str) -> None:
    logits, targets = 4 * torch.randn(6, 50, device=device), torch.arange(6, device=device)
    kept = logits.clone()
    losses = vocab_parallel_cross_entropy(logits, targets, real_rows=45)
    assert torch.equal(logits, kept)
    with_gradient = vocab_parallel_cross_entropy(logits.requires_grad_() * 1, targets, real_rows=45)
    assert_close([with_gradient.detach()], [losses], 1e-6)


def test_masked_tokens_may_have_any_target_and_any_logits(device: str, small_launches: None) -> None:
    logits = torch.randn(4, 20, device=device)
    logits[1], logits[2, 3] = torch.nan, torch.inf
    mask = torch.tensor([1.0, 0.0, 0.0, 1.0], device=device)
    leaf = logits.clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(leaf * 1, torch.tensor([3, -100, 7, 19], device=device), mask)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    assert (losses[1:3] == 0).all()
    assert (gradient[1:3] == 0).all()
    assert gradient.isfinite().all()


def test_what_is_no_token_has_an_infinite_loss_and_bad_logits_show(device: str, small_launches: None) -> None:
    logits = torch.randn(4, 20, device=device)
    logits[2, 5], logits[3, 5] = torch.nan, torch.inf
    losses = vocab_parallel_cross_entropy(logits, torch.tensor([18, -100, 0, 0], device=device), real_rows=17)
    assert losses[:2].isinf().all()
    assert not losses[2:].isfinite().any()


def test_extreme_logits(device: str, small_launches: None) -> None:
    logits = torch.full((4, 40), -torch.inf, device=device)
    logits[0, 7] = 0.0
    logits[1, :] = 1e30
    logits[2, 39] = -1e30
    logits[3, [3, 20]] = torch.tensor([90.0, 89.0], device=device)
    targets = torch.tensor([7, 0, 39, 20], device=device)
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    assert_close([vocab_parallel_cross_entropy(logits, targets)], [expected], 1e-6)


def test_rows_with_a_stride_and_integers_of_32_bits(device: str, small_launches: None) -> None:
    wide, targets = torch.randn(3, 2, 64, device=device), torch.randint(37, (3, 2), device=device, dtype=torch.int32)
    expected = run(lambda x: cross_entropy_reference(x[..., :37], targets), [wide])
    results = run(lambda x: vocab_parallel_cross_entropy(x[..., :37], targets), [wide])
    assert_close(results, expected, 1e-5)


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(ValueError, match="one a token"):
        vocab_parallel_cross_entropy(torch.ones(2, 4), torch.ones(3).long())
    with pytest.raises(ValueError, match="real_rows is 5"):
        vocab_parallel_cross_entropy(torch.ones(2, 4), torch.ones(2).long(), real_rows=5)
    targets = torch.zeros(4).long()
    for logits in (torch.ones(2, 4).t(), torch.ones(1, 6).expand(4, 6), torch.ones(4, 2, 6).transpose(0, 1)[:, ::2]):
        with pytest.raises(ValueError, match="cannot be overwritten"):
            vocab_parallel_cross_entropy(logits, targets.view(logits.shape[:-1]))
    with pytest.raises(ValueError, match="not float64"):
        vocab_parallel_cross_entropy(torch.ones(4, 6).double(), targets)


def test_one_column_may_have_any_stride(device: str, small_launches: None) -> None:
    logits = torch.randn(6, 4, device=device).t()[:, :1]
    assert (vocab_parallel_cross_entropy(logits, torch.zeros(4, device=device).long()) == 0).all()
