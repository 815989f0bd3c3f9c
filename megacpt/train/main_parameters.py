"""fp32 main parameters from weights in full precision, and in their place in checkpoints.

megatron-core makes main parameters of the model's own, which are rounded to bf16 or FP8. Its `reload_model_params`
takes other values for the distributed optimizer alone, and not where Transformer Engine or the host keep main
parameters.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megacpt.model.full_precision import Originals, holds, is_quantized, tensor_entries
from megacpt.train.optimizer import (
    MAIN,
    allocate_state,
    main_and_model_parameters,
    numbered,
    optimizer_parts,
    own_shards,
    set_scaled,
    updated_by,
)


@torch.no_grad()
def set_main_parameters(optimizer: MegatronOptimizer, originals: Originals) -> None:
    """Give main parameters the values that the model's could not hold; before the first step."""
    for part in optimizer_parts(optimizer) if originals else ():
        if not isinstance(part, DistributedOptimizer):
            for main, model in main_and_model_parameters(part):
                if isinstance(model, torch.nn.Parameter) and model in originals:
                    main.data.copy_(originals[model])
            continue
        if _engine_keeps_them(part):
            allocate_state(part)
        for _, parameter, span in own_shards(part):
            if parameter in originals:
                _set_main(part, parameter, originals[parameter].flatten()[span].float())


def _engine_keeps_them(part: DistributedOptimizer) -> bool:
    """Whether main parameters are in the state of Transformer Engine's AdamW."""
    precise: bool = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    return precise and not isinstance(part.optimizer, HybridDeviceOptimizer)


def _set_main(part: DistributedOptimizer, parameter: torch.nn.Parameter, shard: torch.Tensor) -> None:
    updated = updated_by(part, parameter)
    if isinstance(part.optimizer, HybridDeviceOptimizer):
        part.optimizer.param_to_fp32_param[updated].data.copy_(shard)
    elif _engine_keeps_them(part):
        set_scaled(part, parameter, {MAIN: shard})
    else:
        updated.data.copy_(shard)


def put_main_parameters(
    model_state: dict[str, Any], optimizer: MegatronOptimizer, state: dict[int, dict[int, dict[str, Any]]]
) -> None:
    """Save main parameters, in bf16, in the place of FP8 weights: what a run with bf16 weights would save.

    Rounded to FP8 they would be no use to whoever goes on from them, evaluates or exports them.

    Args:
        model_state: the model's sharded state dict; changed in place.
        state: as `sharded_optimizer_state` returned it, to be saved.
    """
    if not any(is_quantized(entry.data) for entry in tensor_entries(model_state)):
        return
    mains = {
        parameter: state[index][number][MAIN].data
        for index, part in enumerate(optimizer_parts(optimizer))
        if isinstance(part, DistributedOptimizer)
        for number, parameter in numbered(part)
    }
    _exchange(model_state, lambda parameter: mains[parameter].to(parameter.dtype), is_quantized)


def make_room(model_state: dict[str, Any]) -> None:
    """Load into plain tensors what FP8 parameters are to take whole: slices of them have no scale of their own."""

    def plain(parameter: torch.Tensor) -> torch.Tensor:
        return torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")

    _exchange(model_state, plain, is_quantized)


def ask_for_main_parameters(model_state: dict[str, Any], stored: Mapping[str, ShardedTensor]) -> set[str]:
    """Load main parameters in the place of weights where a checkpoint has both; returns the keys of those weights.

    Weights that the model's parameters cannot hold are loaded into tensors of the checkpoint's own dtype.
    """
    instead = set()
    for entry in tensor_entries(model_state):
        main = f"optimizer.state.{MAIN}.{entry.key}"
        if main in stored and not holds(entry.data, torch.float32):
            instead.add(entry.key)
            entry.key = main
    dtypes = {id(entry.data): stored[entry.key].dtype for entry in tensor_entries(model_state) if entry.key in stored}
    _exchange(
        model_state,
        lambda parameter: torch.empty(parameter.shape, dtype=dtypes[id(parameter)], device="cpu"),
        lambda parameter: id(parameter) in dtypes and not holds(parameter, dtypes[id(parameter)]),
    )
    return instead


def _exchange(
    state: dict[str, Any], by: Callable[[torch.nn.Parameter], torch.Tensor], which: Callable[[torch.Tensor], bool]
) -> None:
    """Put other tensors of the same shape in the places of parameters in a sharded state dict."""
    for entry in tensor_entries(state):
        if which(entry.data):
            entry.data = by(entry.data)
            if isinstance(entry, ShardedTensor):
                entry.dtype = entry.data.dtype
