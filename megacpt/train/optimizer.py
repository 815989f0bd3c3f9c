"""AdamW through megatron-core, and its state in model space, which any layout can load.

Moments (and bf16's fp32 main parameters) are saved tensor by tensor under `optimizer.state.<name>.<parameter>`, the
names of megatron-core's "fully reshardable" format, whether or not the optimizer is distributed. `step` is no tensor
here: it is the iteration, written back into every parameter's own state after a load. (torch keeps `step` per
parameter; megatron-core restores one tensor shared by all, which then advances once per parameter.)
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from megacpt.config.tree import Optimizer, Precision
from megacpt.model.gpt import LanguageModel

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "param"
# Transformer Engine marks a moment in FP8 by the dtype of its bytes.
STATE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.uint8}


def wrap_chunks(
    chunks: Sequence[LanguageModel], optimizer: Optimizer, precision: Precision
) -> list[DistributedDataParallel]:
    """Give each chunk megatron-core's gradient buffers and reduction over data-parallel ranks."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=precision.grad_reduce_in_fp32,
        overlap_grad_reduce=optimizer.overlap_grad_reduce,
        overlap_param_gather=optimizer.overlap_param_gather,
        use_distributed_optimizer=optimizer.use_distributed_optimizer,
        check_for_nan_in_grad=False,
        fp8_param_gather=chunks[0].config.fp8_param,
        reuse_grad_buf_for_mxfp8_param_ag=_gathers_mxfp8(chunks[0]),
    )
    wrapped = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
    if not torch.cuda.is_available():
        # There is a buffer now, to which the matmul itself adds a weight's gradient (megacpt.runtime.cpu).
        for module in (module for chunk in chunks for module in chunk.modules()):
            if hasattr(module, "gradient_accumulation_fusion"):
                module.gradient_accumulation_fusion = True
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    if optimizer.overlap_grad_reduce:
        config.no_sync_func = [w.no_sync for w in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
        if len(wrapped) > 1:
            config.grad_sync_func = [w.start_grad_sync for w in wrapped]
    if optimizer.overlap_param_gather and len(wrapped) > 1:
        config.param_sync_func = [w.start_param_sync for w in wrapped]
    return wrapped


def _gathers_mxfp8(chunk: LanguageModel | DistributedDataParallel) -> bool:
    """Whether parameters are mxfp8's: megatron-core gathers them in bf16, through the gradient buffer."""
    return chunk.config.fp8_param and chunk.config.fp8_recipe == "mxfp8"


def build_optimizer(
    wrapped: list[DistributedDataParallel],
    optimizer: Optimizer,
    dtype: torch.dtype,
    gradients: torch.dtype = torch.float32,
) -> MegatronOptimizer:
    """AdamW with decoupled weight decay (none on norms), fp32 main parameters and clipping by global norm.

    Args:
        gradients: dtype of the gradient buffers; the precision-aware optimizer reads them as they are.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=optimizer.use_distributed_optimizer,
        overlap_param_gather=optimizer.overlap_param_gather,
        # megatron-core takes it for the recipe of the parameters, and does nothing with it for plain ones.
        fp8_recipe=wrapped[0].config.fp8_recipe if wrapped[0].config.fp8_param else None,
        reuse_grad_buf_for_mxfp8_param_ag=_gathers_mxfp8(wrapped[0]),
        **_state_settings(optimizer, gradients),
    )
    built = get_megatron_optimizer(config, wrapped, use_gloo_process_groups=False)
    for part in optimizer_parts(built):
        if isinstance(part.optimizer, torch.optim.AdamW) and not torch.cuda.is_available():
            # megatron-core makes torch's AdamW as it comes: on a CPU a dozen passes over a parameter in place of one.
            for group in part.optimizer.param_groups:
                group["fused"] = True
    for group in built.param_groups:
        # megatron-core leaves this product to its own scheduler; without it, norms decay like matrices.
        group["weight_decay"] = optimizer.weight_decay * group["wd_mult"]
    return built


def _state_settings(optimizer: Optimizer, gradients: torch.dtype) -> dict[str, Any]:
    """The precision-aware optimizer's settings; nothing without it."""
    if not optimizer.use_precision_aware_optimizer:
        return {}
    return {
        "use_precision_aware_optimizer": True,
        "main_grads_dtype": gradients,
        "exp_avg_dtype": STATE_DTYPES[optimizer.exp_avg_dtype],
        "exp_avg_sq_dtype": STATE_DTYPES[optimizer.exp_avg_sq_dtype],
        # With it, the 16 bits that bf16 lacks take the main parameter's place, in memory and in checkpoints; those
        # would load under no other optimizer.
        "store_param_remainders": False,
        "optimizer_cpu_offload": optimizer.optimizer_cpu_offload,
        "optimizer_offload_fraction": optimizer.optimizer_offload_fraction,
        "overlap_cpu_optimizer_d2h_h2d": optimizer.overlap_cpu_optimizer_d2h_h2d,
    }


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """The same rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that it consists of and that have parameters."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def distributed_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The parts of an optimizer that are sharded over data-parallel ranks."""
    return [part for part in optimizer_parts(optimizer) if isinstance(part, DistributedOptimizer)]


def main_and_model_parameters(part: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of what the inner optimizer updates and the model parameter it stands for."""
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for mains, models in zip(part.fp32_from_float16_groups, part.float16_groups, strict=True):
            yield from zip(mains, models, strict=True)
        for group in part.fp32_from_fp32_groups:
            yield from zip(group, group, strict=True)
    else:
        for group in part.param_groups:
            yield from zip(group["params"], group["params"], strict=True)


def allocate_state(part: MegatronOptimizer) -> None:
    """Make the state that a first step would make, to be overwritten."""
    inner = part.optimizer
    if isinstance(inner, HybridDeviceOptimizer):
        # Its state appears in a step; what that writes is about to be overwritten.
        inner.dummy_step()
    elif part.config.use_precision_aware_optimizer:
        for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
            if not inner.state[parameter]:
                inner.initialize_state(parameter, False)
    elif part.init_state_fn is not None:
        part.init_state_fn(part.optimizer, part.config)


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, loading: bool
) -> dict[int, dict[int, dict[str, Any]]]:
    """By part of the optimizer: parameter number -> {exp_avg, exp_avg_sq, param (bf16 only): sharded tensor}.

    Args:
        model_state: the model's sharded state dict, whose entries hold the live parameters.
        loading: allocate state to be overwritten, instead of gathering what there is.
    """
    by_parameter = {id(entry.data): entry for entry in nested_values(model_state) if isinstance(entry, ShardedBase)}
    state = {}
    for index, part in enumerate(optimizer_parts(optimizer)):
        if loading or not part.optimizer.state:
            allocate_state(part)
        if isinstance(part, DistributedOptimizer):
            whole = part.sharded_param_state_fully_reshardable(model_state, loading, {})
            state[index] = {number: _named(tensors, part.config.bf16) for number, tensors in whole.items()}
            continue
        entries = {}
        for number, (main, model) in enumerate(main_and_model_parameters(part)):
            tensors = {name: part.optimizer.state[main][name] for name in MOMENTS}
            if main is not model:
                tensors[MAIN] = main.data
            shard = by_parameter[id(model)]
            entries[number] = {
                k: make_sharded_optimizer_tensor(shard, t, f"optimizer.state.{k}") for k, t in tensors.items()
            }
        state[index] = entries
    return state


def _named(tensors: dict[str, Any], bf16: bool) -> dict[str, Any]:
    """Of a distributed optimizer's tensors those to keep; in fp32 the main parameter is the model's own."""
    return {name: tensors[name] for name in (*MOMENTS, *([MAIN] if bf16 else []))}


def common_optimizer_state(optimizer: MegatronOptimizer, iteration: int) -> dict[str, Any]:
    """What Megatron-LM's own optimizer wants back besides tensors: groups' settings and the step; {} without any.

    megacpt does not read it. In fp32 the plain optimizer finds it, in bf16 the distributed one, one level deeper.
    """
    parts = optimizer_parts(optimizer)
    if len(parts) != 1:
        return {}
    (part,) = parts
    # Whether torch steps in one pass is this machine's affair.
    # Nor are the classes by which an offloading optimizer names its parts: who lacks the package could not open them.
    groups = [
        {k: None if k == "fused" else v for k, v in group.items() if k != "params" and not isinstance(v, type)}
        for group in part.param_groups
    ]
    inner: dict[str, Any] = {"param_groups": [group | {"step": iteration} for group in groups]}
    if part.config.bf16:
        return {"optimizer": inner, "param_state_sharding_type": "fully_reshardable"}
    if isinstance(part.optimizer, torch.optim.AdamW | torch.optim.Adam):
        inner["state"] = {"common_step": torch.tensor(float(iteration))}
    return inner


@torch.no_grad()
def load_optimizer_state(
    optimizer: MegatronOptimizer, state: dict[int, dict[int, dict[str, Any]]], iteration: int
) -> None:
    """Write loaded tensors (the structure of `sharded_optimizer_state`) back; every parameter gets its own `step`.

    A part without parameters (all of this stage's are frozen) may be missing.
    """
    for index, part in enumerate(optimizer_parts(optimizer)):
        entries = state.get(index, {})
        if isinstance(part, DistributedOptimizer):
            _load_shards(part, entries)
        else:
            for number, (main, _) in enumerate(main_and_model_parameters(part)):
                for name in MOMENTS:
                    part.optimizer.state[main][name].copy_(entries[number][name])
                if MAIN in entries[number]:
                    main.data.copy_(entries[number][MAIN])
        _set_step(part.optimizer, iteration)


def _load_shards(part: DistributedOptimizer, entries: dict[int, dict[str, Any]]) -> None:
    """Cut this rank's shards out of whole tensors."""
    for number, parameter, span in own_shards(part):
        shards = {name: tensor.flatten()[span] for name, tensor in entries[number].items()}
        if part.config.use_precision_aware_optimizer:
            set_scaled(part, parameter, shards)
            continue
        main = updated_by(part, parameter)
        for name, shard in shards.items():
            target = main if name == MAIN else part.optimizer.state[main][name]
            target.copy_(shard)
    if isinstance(part.optimizer, HybridDeviceOptimizer):
        part.optimizer._sync_hdo_state_to_sub_optimizers()


def numbered(part: DistributedOptimizer) -> Iterator[tuple[int, torch.nn.Parameter]]:
    """Parameters as they are numbered: in the order of the gradient buffers."""
    return enumerate(parameter for buffer in part.buffers for parameter in buffer.param_index_map)


def own_shards(part: DistributedOptimizer) -> Iterator[tuple[int, torch.nn.Parameter, slice]]:
    """The parameters of which this rank updates something, with their numbers, and what of them, flat."""
    here = {
        parameter: spans["param"]
        for ranges_by_dtype in part.gbuf_ranges
        for buckets in ranges_by_dtype.values()
        for bucket in buckets
        for parameter, spans in bucket["param_map"].items()
    }
    for number, parameter in numbered(part):
        if parameter in here:
            yield number, parameter, slice(here[parameter].start, here[parameter].end)


def updated_by(part: DistributedOptimizer, parameter: torch.nn.Parameter) -> torch.Tensor:
    """What the inner optimizer knows of a parameter: this rank's part of the main parameter, or what stands for it."""
    group, order = part.model_param_group_index_map[parameter]
    updated: torch.Tensor = part.optimizer.param_groups[group]["params"][order]
    return updated


def set_scaled(part: DistributedOptimizer, parameter: torch.Tensor, shards: dict[str, torch.Tensor]) -> None:
    """Into state that may be in another dtype than it is saved in (fp32), or in host memory.

    With offloaded state these very tensors become it, and the part that stays on the GPU is moved there afterwards: all
    of it would not fit.
    """
    device = "cpu" if isinstance(part.optimizer, HybridDeviceOptimizer) else torch.cuda.current_device()
    part._set_main_param_and_optimizer_states(
        parameter, {name: shard.detach().clone().float().to(device) for name, shard in shards.items()}
    )


def _set_step(inner: torch.optim.Optimizer, iteration: int) -> None:
    if isinstance(inner, HybridDeviceOptimizer):
        for part in inner.sub_optimizers:
            _set_step(part, iteration)
        return
    for group in inner.param_groups:
        if isinstance(inner, torch.optim.AdamW | torch.optim.Adam):
            for parameter in group["params"]:
                inner.state[parameter]["step"] = torch.tensor(float(iteration), dtype=torch.float32)
        else:
            group["step"] = iteration
