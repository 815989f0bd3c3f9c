"""Sums over the transformer layers' elements, each counted once, wherever parallelism of any kind has put it.

A rank accounts for its own tensor-parallel shards, for whole tensors (norms, some biases) if it is the first of its
group, and of all those for its part among the data- and context-parallel ranks that have equal ones. Embeddings, the
final norm and the output layer are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate

from megacpt.model.gpt import LanguageModel
from megacpt.train.optimizer import distributed_parts

BLOCK = 1 << 24
"""Elements worked on at a time, so that temporary tensors stay small beside a weight."""


@dataclass(frozen=True)
class Share:
    """Elements start..stop of a flattened parameter of layer 0, 1, ... of the whole model."""

    layer: int
    parameter: torch.nn.Parameter
    start: int
    stop: int

    @property
    def gradient(self) -> torch.Tensor:
        """The parameter's place in its chunk's gradient buffer; a rank's own part of it is reduced."""
        return self.parameter.main_grad  # type: ignore[attr-defined]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same elements of a tensor of the parameter's shape, flat."""
        return tensor.detach().reshape(-1)[self.start : self.stop]


def weight_shares(chunks: Sequence[LanguageModel]) -> list[Share]:
    """What this rank accounts for where data- and context-parallel ranks hold equal tensors."""
    rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    size = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    found = []
    for layer, parameter in _layer_parameters(chunks):
        count = parameter.numel()
        found.append(Share(layer, parameter, count * rank // size, count * (rank + 1) // size))
    return found


def gradient_shares(chunks: Sequence[LanguageModel], optimizer: MegatronOptimizer) -> list[Share]:
    """What this rank accounts for of reduced gradients.

    The distributed optimizer reduces to each rank the part of the gradient buffer that it updates, and no other.
    """
    parts = distributed_parts(optimizer)
    reduced = {
        id(parameter): spans["param"]
        for part in parts
        for ranges_by_dtype in part.gbuf_ranges
        for buckets in ranges_by_dtype.values()
        for bucket in buckets
        for parameter, spans in bucket["param_map"].items()
    }
    shares = [share for share in weight_shares(chunks) if share.parameter.requires_grad]
    if not parts:
        return shares
    here = [share for share in shares if id(share.parameter) in reduced]
    spans = [reduced[id(share.parameter)] for share in here]
    return [Share(s.layer, s.parameter, span.start, span.end) for s, span in zip(here, spans, strict=True)]


def sum_over_ranks(by_layer: torch.Tensor) -> torch.Tensor:
    """Sums [layers, ...] of all ranks' shares, on the CPU."""
    total = by_layer.to(torch.cuda.current_device())
    dist.all_reduce(total)
    return total.cpu()


def gather_parameters(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Finish the all-gather that overlap_param_gather leaves to the next forward pass."""
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            with torch.no_grad():
                chunk.start_param_sync(force_sync=True)


def _layer_parameters(chunks: Sequence[LanguageModel]) -> list[tuple[int, torch.nn.Parameter]]:
    return [
        (layer.layer_number - 1, parameter)
        for chunk in chunks
        for layer in chunk.decoder.layers
        for parameter in layer.parameters()
        if param_is_not_tensor_parallel_duplicate(parameter)
    ]
