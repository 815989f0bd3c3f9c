"""Sums by source: `bincount` of every token, masks, sources that are nobody's."""

import pytest
import torch

from megacpt_kernels.source_sums import source_sums, source_sums_reference


@pytest.mark.parametrize("tokens", [0, 1, 37, 64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("integers", [torch.int64, torch.int32, torch.int16])
def test_sums_and_counts(device: str, tokens: int, masked: bool, integers: torch.dtype, small_launches: None) -> None:
    losses, sources = torch.rand(tokens, device=device), torch.randint(5, (tokens,), device=device).to(integers)
    mask = (torch.rand(tokens, device=device) > 0.5).float() if masked else None
    kept = torch.ones_like(losses) if mask is None else mask
    for function in (source_sums, source_sums_reference):
        sums, counts = function(losses, sources, 7, mask)
        expected = torch.bincount(sources.long(), losses.double() * kept, minlength=7).double()
        torch.testing.assert_close(sums.double(), expected, rtol=1e-6, atol=1e-6)
        assert (sums.dtype, counts.dtype) == (torch.float32, torch.int64)
        assert torch.equal(counts, torch.bincount(sources.long(), kept, minlength=7).long())


def test_a_token_of_no_source_is_left_out_and_shapes_may_be_any(device: str) -> None:
    losses, sources = torch.ones(2, 3, device=device), torch.tensor([[-1, 0, 9], [1, 1, 2]], device=device)
    sums, counts = source_sums(losses, sources, 3)
    assert sums.tolist() == [1, 2, 1]
    assert counts.tolist() == [1, 2, 1]


def test_what_masked_tokens_lost_does_not_count(device: str) -> None:
    losses = torch.tensor([1.0, torch.nan, torch.inf], device=device)
    sums, counts = source_sums(losses, torch.zeros(3, device=device).long(), 1, torch.tensor([1, 0, 0], device=device))
    assert (sums.tolist(), counts.tolist()) == ([1.0], [1])


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="must be as well"):
        source_sums(torch.ones(3), torch.ones(4).long(), 2)
