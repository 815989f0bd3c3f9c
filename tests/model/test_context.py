"""Attention over ranks that share a sequence is that of the whole sequence, forward and backward."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.attention.bias import causal_lower_right

from megacpt.model.context import causal_bias, own_positions
from megacpt.model.forward import document_mask
from megacpt.model.layers import SDPAttention
from tests.ranks import run_ranks

ROWS, LENGTH, CHANNELS = 2, 24, 10
Tensors = list[torch.Tensor]


def tensors(groups: int, dtype: torch.dtype) -> Tensors:
    """Queries of 4 heads, keys and values of the whole sequence [s, b, h, d], and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(LENGTH, ROWS, heads, CHANNELS) for heads in (4, groups, groups)] + [(LENGTH, ROWS, 4 * CHANNELS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def documents() -> torch.Tensor:
    """Ids [b, s]: boundaries inside chunks, on their edges, and a document over both of a rank's chunks."""
    lengths = torch.tensor([[5, 1, 6, 12], [2, 19, 1, 2]])
    return torch.stack([torch.repeat_interleave(torch.arange(4), row) for row in lengths])


def shared(cases: list[tuple[int, torch.dtype, bool]]) -> list[Tensors]:
    """Of each case what this rank computes of its positions: output, gradients of queries, keys and values."""
    import torch.distributed as dist

    size, rank = dist.get_world_size(), dist.get_rank()
    settings: Any = SimpleNamespace(kv_channels=CHANNELS, context_parallel_size=size)
    groups: Any = SimpleNamespace(cp=dist.group.WORLD)
    attention = SDPAttention(settings, 1, AttnMaskType.causal, "self", cp_comm_type="all_gather", pg_collection=groups)
    found = []
    for query_groups, dtype, masked in cases:
        *inputs, gradient = (own_positions(x, size, rank) for x in tensors(query_groups, dtype))
        leaves = [x.requires_grad_() for x in inputs]
        output = attention(*leaves, document_mask(documents(), size, rank) if masked else None)
        found.append([output.detach(), *torch.autograd.grad(output, leaves, gradient)])
    return found


def whole(query_groups: int, masked: bool) -> Tensors:
    """The same of all positions, in float64, by the definition of attention."""
    *inputs, gradient = tensors(query_groups, torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    query, key, value = (x.permute(1, 2, 0, 3) for x in leaves)
    key, value = (x.repeat_interleave(4 // query_groups, 1) for x in (key, value))
    hidden = document_mask(documents() if masked else torch.zeros(ROWS, LENGTH))
    scores = (query @ key.mT / CHANNELS**0.5).masked_fill(hidden, float("-inf"))
    output = (scores.softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


@pytest.mark.parametrize("size", [2, 3])
def test_attention_is_that_of_the_whole_sequence(size: int) -> None:
    cases = [
        (query_groups, dtype, masked)
        for query_groups in (4, 2)
        for dtype in (torch.float32, torch.bfloat16)
        for masked in (False, True)
    ]
    ranks = run_ranks(shared, size, cases)
    for number, (query_groups, dtype, masked) in enumerate(cases):
        tolerance = 1e-5 if dtype is torch.float32 else 5e-2
        for part, expected in enumerate(whole(query_groups, masked)):
            for rank, found in enumerate(ranks):
                own = own_positions(expected, size, rank)
                torch.testing.assert_close(found[number][part].double(), own, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shared_mask_is_torch_s_lower_right_one(dtype: torch.dtype) -> None:
    """torch's own is what a GPU gets; without one it makes such a mask itself."""
    query, key, value, _ = (x.permute(1, 2, 0, 3) if x.dim() == 4 else x for x in tensors(2, dtype))
    query, key, value = query[:, :, :6], key[:, :, :18], value[:, :, :18]
    results = []
    for bias in (causal_bias(query, 18), causal_lower_right(6, 18)):
        leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
        output = F.scaled_dot_product_attention(*leaves, attn_mask=bias, enable_gqa=True)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for ours, torchs in zip(*results, strict=True):
        assert torch.equal(ours, torchs)
    assert causal_bias(query, 18) is causal_bias(query.clone(), 18)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels", [64, 100])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_positions_on_a_gpu(channels: int, groups: int, dtype: torch.dtype) -> None:
    """Queries of the last 256 of 768 positions, forward and backward, against the definition in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, length, channels) for heads, length in ((4, 256), (groups, 768), (groups, 768), (4, 256))]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).cuda() for shape in shapes]
    results = []
    for kind in (dtype, torch.float64):
        *leaves, gradient = (x.to(kind).requires_grad_(n < 3) for n, x in enumerate(inputs))
        query, key, value = leaves
        if kind is dtype:
            bias = causal_bias(query, 768)
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=groups < 4)
        else:
            key, value = (x.repeat_interleave(4 // groups, 1) for x in (key, value))
            hidden = torch.ones(256, 768, dtype=torch.bool, device="cuda").triu(513)
            scores = (query @ key.mT / channels**0.5).masked_fill(hidden, float("-inf"))
            output = scores.softmax(-1) @ value
        results.append([output, *torch.autograd.grad(output, leaves, gradient)])
    tolerance = 1e-4 if dtype is torch.float32 else 5e-2
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
