"""Import: this rank's parameters filled in place from a Hugging Face folder, slice by slice of what they cover."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megacpt.model.full_precision import Originals, Place, fill_parameters, places_of
from megacpt.model.hf.rows import cut
from megacpt.model.hf.source import Source
from megacpt.model.hf.table import Family, Weight, checkpoint_key

LAYER_NUMBER = re.compile(r"(?<=\.layers\.)(\d+)\.")
Report = Callable[[int], object]
"""Called with the number of parameters that have just been filled."""


class Target(NamedTuple):
    """A part of this rank's parameters: of which weight and layer, from which row and column on; `data` gets filled."""

    weight: Weight
    layer: int | None
    offset: tuple[int, ...]
    data: torch.Tensor


def targets(place: Place, family: Family) -> list[Target]:
    """What there is to fill of a parameter; megatron-core says which part of the whole each shard is."""
    weights = {weight.key: weight for weight in family.weights}
    return [_target(shard, weights) for shard in place.shards(place.parameter)]


def _target(shard: ShardedTensor, weights: dict[str, Weight]) -> Target:
    key, axes = checkpoint_key(shard.key), shard.prepend_axis_num
    numbered = LAYER_NUMBER.search(key)
    layer = shard.global_offset[0] if axes else int(numbered[1]) if numbered else None
    weight = weights[LAYER_NUMBER.sub("", key)]
    return Target(weight, layer if weight.in_layer else None, tuple(shard.global_offset[axes:]), shard.data)


def fill_weights(
    chunks: Sequence[torch.nn.Module],
    source: Source,
    report: Report = lambda count: None,
    originals: Originals | None = None,
) -> None:
    """Fill every parameter of this rank, converting to its dtype; rows of vocabulary padding become zero.

    Memory: the parameters, one slice of one tensor, the pages of one safetensors file, and what goes into `originals`
    (`megacpt.model.full_precision.fill_parameters`).
    """
    weights = {weight.key: weight for weight in source.family.weights}

    def layer(place: Place) -> int:
        number = targets(place, source.family)[0].layer
        return -1 if number is None else number

    def fill(shard: ShardedTensor) -> None:
        fill_target(_target(shard, weights), source)
        report(shard.data.numel())

    # Layer by layer, as files have them: each is mapped once, and few of its pages at a time.
    fill_parameters(sorted(places_of(chunks), key=layer), fill, source.dtype, originals)


@torch.no_grad()
def fill_target(target: Target, source: Source) -> None:
    """Fill one target from the slices that it covers."""
    (first, *others), data = target.offset, target.data
    columns = tuple(slice(offset, offset + size) for offset, size in zip(others, data.shape[1:], strict=True))
    position = 0
    for span in cut(target.weight.layout(source.architecture), first, first + data.shape[0]):
        name = target.weight.parts[span.part].name.format(layer=target.layer)
        data[position : position + span.rows].copy_(source.read(name, (slice(span.start, span.stop), *columns)))
        position += span.rows
    data[position:].zero_()
