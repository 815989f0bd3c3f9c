"""Two and three ranks with a padded vocabulary: one rank with all of it in torch fp32, and megatron-core's own loss."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy as megatrons

from megacpt_kernels.cross_entropy import vocab_parallel_cross_entropy
from megacpt_kernels.linear_cross_entropy import HeadOptions, linear_cross_entropy, linear_cross_entropy_sum
from megacpt_kernels.token_losses import SourceSums
from tests.kernels.compare import assert_close, use_small_launches
from tests.ranks import run_ranks

TOKENS, HIDDEN = 11, 8
CASES = [(45, 66), (20, 66), (54, 54)]
"""Tokens and padded rows of a vocabulary: the last rank has some, none, or all of its rows."""
SOURCES = torch.arange(TOKENS) % 3


def case(real: int, padded: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(TOKENS, HIDDEN, generator=generator), torch.randn(padded, HIDDEN, generator=generator)
    targets = torch.randint(real, (TOKENS,), generator=generator)
    upstream = torch.randn(TOKENS, generator=generator).abs()
    upstream[4] = 0.0
    return hidden, weight, targets, upstream


def on_one_rank(real: int, padded: int) -> dict[str, torch.Tensor]:
    hidden, weight, targets, upstream = case(real, padded)
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = hidden @ weight.t()
    losses = F.cross_entropy(logits[:, :real], targets, reduction="none")
    (losses * upstream).sum().backward()
    dlogits = torch.autograd.functional.jacobian(
        lambda x: (F.cross_entropy(x[:, :real], targets, reduction="none") * upstream).sum(), logits.detach()
    )
    return {"losses": losses.detach(), "dlogits": dlogits, "dhidden": hidden.grad, "dweight": weight.grad}


def on_this_rank() -> list[dict[str, torch.Tensor]]:
    """Run on each rank: the results of all cases, blocks small and outputs poisoned."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    use_small_launches(setattr)
    return [shard_of(*sizes) for sizes in CASES]


def shard_of(real: int, padded: int) -> dict[str, torch.Tensor]:
    """Every result of ours, and megatron-core's, of this rank's part of the vocabulary."""
    rank, group = dist.get_rank(), dist.group.WORLD
    columns = padded // dist.get_world_size()
    hidden, weight, targets, upstream = case(real, padded)
    weight = weight[rank * columns : (rank + 1) * columns].clone().requires_grad_()
    hidden.requires_grad_()
    rows = min(max(real - rank * columns, 0), columns)
    results = {}

    logits = (hidden @ weight.t()).detach().requires_grad_()
    sources = SourceSums.zeros(SOURCES, 3)
    losses = vocab_parallel_cross_entropy(logits * 1, targets, upstream, real_rows=rows, group=group, sources=sources)
    results["losses"], results["sums"] = losses.detach(), sources.sums
    (results["dlogits"],) = torch.autograd.grad((losses * upstream).sum(), logits)

    masked = logits.detach().clone()
    masked[:, rows:] = -torch.inf
    results["megatron"] = megatrons(masked, targets, tp_group=group)

    options = HeadOptions(chunk_bytes=3 * columns * 4)
    losses = linear_cross_entropy(hidden, weight, targets, real_rows=rows, group=group, options=options)
    results["linear"] = losses.detach()
    results["dhidden"], results["dweight"] = torch.autograd.grad((losses * upstream).sum(), [hidden, weight])

    sources = SourceSums.zeros(SOURCES, 3)
    total, losses = linear_cross_entropy_sum(
        hidden, weight, targets, upstream, real_rows=rows, group=group, options=options, sources=sources
    )
    results["sum"], results["linear_sums"] = total.detach(), sources.sums
    results["dhidden_sum"], results["dweight_sum"] = torch.autograd.grad(total, [hidden, weight])

    options = HeadOptions(reduce_hidden_grad=False)
    losses = linear_cross_entropy(hidden, weight, targets, real_rows=rows, group=group, options=options)
    (results["dhidden_part"],) = torch.autograd.grad((losses * upstream).sum(), hidden)
    return results


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> list[list[dict[str, torch.Tensor]]]:
    return run_ranks(on_this_rank, request.param)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_they_are_one(ranks: list[list[dict[str, torch.Tensor]]], number: int) -> None:
    expected, upstream = on_one_rank(*CASES[number]), case(*CASES[number])[3]
    parts = [results[number] for results in ranks]
    for part in parts:
        counted = upstream != 0
        assert counted.sum() == TOKENS - 1
        assert_close([part["losses"][counted]], [expected["losses"][counted]], 1e-5)
        assert (part["losses"][~counted] == 0).all()
        assert_close([part["megatron"], part["linear"]], [expected["losses"]] * 2, 1e-5)
        assert_close([part["sum"]], [(expected["losses"] * upstream).sum()], 1e-5)
        lost = torch.stack((expected["losses"].where(counted, 0.0), counted.float())).double()
        by_source = torch.zeros(2, 3, dtype=torch.float64).index_add_(1, SOURCES, lost)
        assert_close([part["sums"], part["linear_sums"]], [by_source] * 2, 1e-5)
        assert_close([part["dhidden"], part["dhidden_sum"]], [expected["dhidden"]] * 2, 1e-5)
    for name, whole, axis in (("dlogits", "dlogits", 1), ("dweight", "dweight", 0), ("dweight_sum", "dweight", 0)):
        assert_close([torch.cat([part[name] for part in parts], axis)], [expected[whole]], 1e-5)
    assert_close([sum(part["dhidden_part"] for part in parts)], [expected["dhidden"]], 1e-5)
    assert all(torch.equal(part["losses"], parts[0]["losses"]) for part in parts)
