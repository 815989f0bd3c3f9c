"""Losses from ranks' statistics, masks, and sums by source: `bincount` of every token, sources that are nobody's."""

import pytest
import torch
import torch.nn.functional as F

from megacpt_kernels.cross_entropy import vocab_parallel_cross_entropy
from megacpt_kernels.linear_cross_entropy import HeadOptions, linear_cross_entropy_sum
from megacpt_kernels.token_losses import SourceSums, token_losses, token_losses_reference


def statistics_of(tokens: int, device: str) -> torch.Tensor:
    """[2, 3, tokens]: of two ranks, the first with the target."""
    maximum, total = torch.randn(2, tokens, device=device), 1 + torch.rand(2, tokens, device=device)
    wanted = torch.stack((maximum[0] - torch.rand(tokens, device=device), torch.full((tokens,), -torch.inf).to(device)))
    return torch.stack((maximum, total, wanted), 1)


@pytest.mark.parametrize("tokens", [0, 1, 37, 64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("integers", [torch.int64, torch.int32, torch.int16])
def test_sums_by_source(device: str, tokens: int, masked: bool, integers: torch.dtype, small_launches: None) -> None:
    gathered, ids = statistics_of(tokens, device), torch.randint(5, (tokens,), device=device).to(integers)
    mask = (torch.rand(tokens, device=device) > 0.5).to(torch.uint8) if masked else None
    kept = torch.ones(tokens, device=device) if mask is None else mask.float()
    for function in (token_losses, token_losses_reference):
        sources = SourceSums.zeros(ids, 7)
        for times in (1, 2):
            _, losses = function(gathered, mask, sources)
            lost = torch.bincount(ids.long(), losses.double(), minlength=7).double()
            torch.testing.assert_close(sources.sums[0], times * lost, rtol=1e-6, atol=1e-6)
            assert torch.equal(sources.sums[1], times * torch.bincount(ids.long(), kept.double(), minlength=7))
        assert (losses[kept == 0] == 0).all()
        expected = gathered.select(1, 0) + gathered.select(1, 1).log()
        expected = expected.double().logsumexp(0) - gathered[0, 2].double()
        torch.testing.assert_close(losses.double(), expected.where(kept != 0, 0.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [token_losses, token_losses_reference])
def test_neither_tokens_of_no_source_nor_masked_ones_count(device: str, function, small_launches: None) -> None:
    gathered = statistics_of(6, device)
    gathered[0, 2, :2] = torch.tensor([torch.nan, -torch.inf])
    mask = torch.tensor([0, 0, 1, 1, 1, 1], dtype=torch.uint8, device=device)
    sources = SourceSums.zeros(torch.tensor([0, 0, 0, 1, -1, 9], device=device), 3)
    _, losses = function(gathered, mask, sources)
    assert sources.sums[1].tolist() == [1, 1, 0]
    assert sources.sums[0].tolist() == [losses[2].item(), losses[3].item(), 0]


@pytest.mark.parametrize("everything_masked", [False, True])
def test_mask_and_sources_of_a_model_s_losses(device: str, everything_masked: bool, small_launches: None) -> None:
    """Both cross-entropies on sequence-first logits, as the model gives them, with what is no token where masked."""
    s, b, columns, real, hidden = 9, 3, 37, 33, 5
    states, weight = torch.randn(s, b, hidden, device=device), torch.randn(columns, hidden, device=device)
    targets = torch.randint(real, (b, s), device=device)
    mask = torch.zeros(b, s, device=device) if everything_masked else (torch.rand(b, s, device=device) < 0.6).float()
    targets[mask == 0] = -100
    ids = torch.tensor([2, 0, 2], device=device)[:, None].expand(b, s)

    double = [states.double().requires_grad_(), weight.double().requires_grad_()]
    logits = (double[0] @ double[1].t())[..., :real].transpose(0, 1).flatten(0, 1)
    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="none").view(b, s)
    expected_sums = torch.zeros(2, 4, device=device, dtype=torch.float64).index_add_(
        1, ids.flatten(), torch.stack((losses.detach(), mask.double())).flatten(1)
    )
    expected = torch.autograd.grad(losses.sum(), double)

    for linear in (False, True):
        tally = SourceSums(ids.t(), torch.zeros(2, 4, dtype=torch.float64, device=device))
        leaves = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
        if linear:
            options = HeadOptions(chunk_bytes=7 * columns * 4)
            arguments = (*leaves, targets.t(), mask.t())
            total, _ = linear_cross_entropy_sum(*arguments, real_rows=real, options=options, sources=tally)
        else:
            logits = leaves[0] @ leaves[1].t()
            total = vocab_parallel_cross_entropy(logits, targets.t(), mask.t(), real_rows=real, sources=tally).sum()
        torch.testing.assert_close(total.double(), losses.sum().detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tally.sums, expected_sums, rtol=1e-5, atol=1e-5)
        for found, wanted in zip(torch.autograd.grad(total, leaves), expected, strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ids of sources are \(4,\)"):
        vocab_parallel_cross_entropy(
            torch.ones(3, 5), torch.zeros(3).long(), sources=SourceSums.zeros(torch.zeros(4).long(), 2)
        )
