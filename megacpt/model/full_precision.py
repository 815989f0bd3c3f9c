"""Weights on their way into a model that cannot hold them: bf16 parameters, and FP8 ones of Transformer Engine.

megatron-core makes its fp32 main parameters of the model's, which are rounded by then. What rounding loses is kept in
host memory until there is an optimizer to take it (`megacpt.train.main_parameters`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from megatron.core import fp8_utils
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories

Originals = dict[torch.nn.Parameter, torch.Tensor]
"""Of parameters that cannot hold their values: these, of the same shape, on the CPU."""


class Place(NamedTuple):
    """A parameter of this rank, and which part of a whole weight it is."""

    parameter: torch.nn.Parameter
    entry: ShardedTensor | ShardedTensorFactory

    def shards(self, data: torch.Tensor) -> list[ShardedTensor]:
        """megatron-core's shards (two of a gated fc1) as views of `data`, which has the parameter's shape."""
        typed = {"dtype": data.dtype} if isinstance(self.entry, ShardedTensor) else {}
        state: dict[str, Any] = {"": replace(self.entry, data=data, **typed)}
        apply_factories(state)
        return [shard for shard in nested_values(state) if isinstance(shard, ShardedTensor)]


def places_of(chunks: Sequence[torch.nn.Module]) -> Iterator[Place]:
    """This rank's parameters, from the input to the output."""
    for chunk in chunks:
        sharded: dict[str, Any] = chunk.sharded_state_dict()  # type: ignore[operator]
        yield from (Place(entry.data, entry) for entry in tensor_entries(sharded))


def tensor_entries(state: dict[str, Any]) -> Iterator[Any]:
    """The entries of a sharded state dict that hold a tensor."""
    kinds = (ShardedTensor, ShardedTensorFactory)
    return (entry for entry in nested_values(state) if isinstance(entry, kinds) and entry.data is not None)


def is_quantized(tensor: Any) -> bool:
    """Whether it is a tensor of Transformer Engine's that holds FP8."""
    return isinstance(tensor, torch.Tensor) and fp8_utils.is_float8tensor(tensor)


def holds(parameter: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the parameter can take any values of a dtype (fp32 or bf16) as they are."""
    return parameter.dtype in (dtype, torch.float32) and not is_quantized(parameter)


@torch.no_grad()
def fill_parameters(
    places: Iterable[Place],
    fill: Callable[[ShardedTensor], object],
    dtype: torch.dtype,
    originals: Originals | None = None,
) -> None:
    """Fill parameters of this rank, in the order given, by filling their shards.

    Args:
        fill: writes a shard's `data`, in place.
        dtype: of the values that it writes, fp32 or bf16.
        originals: gets what parameters cannot hold. Without it they are filled in place, which FP8 ones cannot be: a
            slice of one has no scale of its own.
    """
    for place in places:
        parameter = place.parameter
        assert originals is not None or not is_quantized(parameter), "FP8 parameters are filled whole"
        if originals is None or holds(parameter, dtype):
            for shard in place.shards(parameter):
                fill(shard)
            continue
        values = torch.empty(parameter.shape, dtype=dtype, device="cpu")
        for shard in place.shards(values):
            fill(shard)
        parameter.copy_(narrowed(parameter, values, originals).to(parameter.device))


def narrowed(parameter: torch.nn.Parameter, values: torch.Tensor, originals: Originals) -> torch.Tensor:
    """Values in a parameter's (nominal) dtype, to be copied into it; those that it cannot hold are noted.

    By way of that dtype Transformer Engine casts main parameters to FP8, too.
    """
    narrow = values.to(parameter.dtype)
    if not narrow.to(values.dtype).equal(values):
        originals[parameter] = values
    elif is_quantized(parameter):
        originals[parameter] = narrow
    return narrow


@contextmanager
def unquantized(chunks: Sequence[torch.nn.Module], originals: Originals) -> Iterator[None]:
    """With plain parameters of the nominal dtype in the place of FP8 ones, to be compared with others' results."""
    taken = [
        (module, name, parameter)
        for chunk in chunks
        for module in chunk.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if is_quantized(parameter)
    ]
    for module, name, parameter in taken:
        plain = originals[parameter].to(parameter.device, parameter.dtype)
        module._parameters[name] = torch.nn.Parameter(plain, requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in taken:
            module._parameters[name] = parameter
