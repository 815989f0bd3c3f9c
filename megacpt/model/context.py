"""Context parallelism: which chunks of a sequence a rank has, and keys and values of all ranks for torch's attention.

A sequence is cut into 2 x CP chunks, and rank r has the r-th from either end, so that every rank has as much of the
causal triangle (Megatron's zigzag, which Transformer Engine's attention expects too). Keys and values are gathered
whole before attention (Grattafiori et al. 2024, arXiv 2407.21783, 3.3.2), their gradients summed and dealt out after.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.nn.attention.bias import causal_lower_right


def context_place() -> tuple[int, int]:
    """Size of this process's context-parallel group, and its rank there; 1 and 0 without one."""
    size = parallel_state.get_context_parallel_world_size()
    return (size, parallel_state.get_context_parallel_rank()) if size > 1 else (1, 0)


def chunk_count(size: int) -> int:
    """Chunks that a sequence is cut into, of which its length is a multiple."""
    return 2 * size if size > 1 else 1


def chunks_of(size: int, rank: int) -> tuple[int, int]:
    """The two of 2 x `size` chunks that a rank has, in the order in which it has them."""
    return rank, 2 * size - 1 - rank


def own_positions(tensor: torch.Tensor, size: int, rank: int, dim: int = 0) -> torch.Tensor:
    """A rank's chunks of `tensor` along `dim`, which is a multiple of 2 x `size` long."""
    if size == 1:
        return tensor
    chunks = tensor.chunk(2 * size, dim)
    return torch.cat([chunks[number] for number in chunks_of(size, rank)], dim)


class GatherKeysAndValues(torch.autograd.Function):
    """Keys and values [s / CP, b, g, d] of this rank to those of all, [s, b, g, d] each, in the sequence's order.

    One all-gather forward; backward one reduce-scatter of both gradients, in their dtype. They share a tensor, so
    neither may be written to.
    """

    @staticmethod
    def forward(
        ctx: Any, key: torch.Tensor, value: torch.Tensor, group: dist.ProcessGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather over `group`."""
        ctx.group = group
        size = group.size()
        own = torch.stack((key, value), dim=1)
        gathered = own.new_empty(size * own.shape[0], *own.shape[1:])
        dist.all_gather_into_tensor(gathered, own, group=group)
        place = {number: at for at, number in enumerate(_as_gathered(size))}
        chunks = gathered.chunk(2 * size)
        everything = torch.cat([chunks[place[number]] for number in range(2 * size)])
        return everything[:, 0], everything[:, 1]

    @staticmethod
    def backward(ctx: Any, key_grad: torch.Tensor, value_grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Sum over `group`, this rank's positions."""
        size = ctx.group.size()
        summed = key_grad.new_empty(len(key_grad), 2, *key_grad.shape[1:])
        keys, values = key_grad.chunk(2 * size), value_grad.chunk(2 * size)
        for place, number in zip(summed.chunk(2 * size), _as_gathered(size), strict=True):
            torch.stack((keys[number], values[number]), dim=1, out=place)
        own = summed.new_empty(len(summed) // size, *summed.shape[1:])
        dist.reduce_scatter_tensor(own, summed, group=ctx.group)
        return own[:, 0], own[:, 1], None


def _as_gathered(size: int) -> list[int]:
    """The chunks of all ranks, one rank's after the other's."""
    return [number for rank in range(size) for number in chunks_of(size, rank)]


def causal_bias(query: torch.Tensor, keys: int) -> torch.Tensor:
    """What keeps queries [b, h, q, d] of the last q of `keys` positions causal, for `scaled_dot_product_attention`.

    Its own flag counts from the first position. On a GPU flash attention knows the case. On a CPU torch would make a
    mask in every call, and keep it for the backward pass: all layers share one here.
    """
    length = query.shape[2]
    if query.device.type != "cpu":
        return causal_lower_right(length, keys)
    return _causal_mask(length, keys, query.dtype)


@lru_cache(maxsize=2)
def _causal_mask(queries: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """[queries, keys], 0 where the last `queries` positions may look, else minus infinity; one for either chunk."""
    return torch.full((queries, keys), float("-inf"), dtype=dtype).triu(keys - queries + 1)
