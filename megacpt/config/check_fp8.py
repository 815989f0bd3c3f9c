"""Checks of the keys of FP8 layers, against each other and against all that does not go with them."""

from collections.abc import Iterator

from megacpt.config.architecture import Architecture
from megacpt.config.tree import Config, Model

FP8_ALIGNMENT = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
"""Both dimensions of an FP8 matmul's operands are multiples of this."""
FP8_KEYS = (
    "fp8_recipe",
    "fp8_margin",
    "fp8_amax_history_len",
    "fp8_amax_compute_algo",
    "fp8_param_gather",
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
)


def check_fp8(config: Config, architecture: Architecture, bf16: bool) -> Iterator[str]:
    """What is wrong, a sentence each that names the keys."""
    yield from _without_effect(config.model)
    if config.model.fp8 is not None:
        yield from _layers(config, architecture, bf16)
    yield from _parameters(config)


def _layers(config: Config, architecture: Architecture, bf16: bool) -> Iterator[str]:
    model = config.model
    if not bf16:
        yield f"model.fp8 {model.fp8} needs precision.dtype bf16; set it, or model.fp8 to null"
    if model.fp8_recipe == "delayed" and model.first_last_layers_bf16:
        yield (
            "model.first_last_layers_bf16 does not go with fp8_recipe delayed, whose maxima are reduced once for all "
            "layers; choose tensorwise, blockwise or mxfp8"
        )
    probe = config.diagnostics.gradient_probe
    if model.fp8_recipe == "delayed" and (probe.at or probe.every is not None):
        yield (
            "diagnostics.gradient_probe would leave the maxima of its own passes with fp8_recipe delayed; choose "
            "another recipe, or unset it"
        )
    stage_layers = architecture.num_layers // model.pipeline_model_parallel_size
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        count = getattr(model, name)
        if model.first_last_layers_bf16 and count > stage_layers:
            yield f"model.{name} {count} is more than the {stage_layers} layers of a pipeline stage; lower it"
    yield from _shapes(config, architecture)


def _without_effect(model: Model) -> Iterator[str]:
    """Keys that are set and that nothing would read."""
    changed = {name for name in FP8_KEYS if getattr(model, name) != type(model).model_fields[name].default}
    if model.fp8 is None:
        for name in FP8_KEYS:
            if name in changed:
                yield f"model.{name} is about layers in FP8, and model.fp8 is null; set both or neither"
        return
    for name in ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo"):
        if name in changed and model.fp8_recipe != "delayed":
            yield f"model.{name} is about fp8_recipe delayed, and this one is {model.fp8_recipe}; leave it out"
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if name in changed and not model.first_last_layers_bf16:
            yield f"model.{name} does nothing without model.first_last_layers_bf16; set both or neither"


def _shapes(config: Config, architecture: Architecture) -> Iterator[str]:
    model, data = config.model, config.data
    tp = model.tensor_model_parallel_size
    shards = model.context_parallel_size * (tp if model.sequence_parallel else 1)
    sizes = {
        "model.hidden_size": architecture.hidden_size,
        f"model.ffn_hidden_size / TP {tp}": architecture.ffn_hidden_size // tp,
        f"rows of queries, keys and values / TP {tp}": architecture.qkv_size // tp,
        f"kv_channels x num_attention_heads / TP {tp}": architecture.kv_channels
        * architecture.num_attention_heads
        // tp,
        "tokens of a micro-batch on a rank (micro_batch_size x seq_length / CP / TP of sequence parallelism)": (
            config.train.micro_batch_size * data.seq_length // shards
        ),
    }
    unit = FP8_ALIGNMENT[model.fp8_recipe]
    for name, size in sizes.items():
        if size % unit:
            yield f"model.fp8_recipe {model.fp8_recipe} needs multiples of {unit}, but {name} is {size}; change it"


def _parameters(config: Config) -> Iterator[str]:
    model, optimizer = config.model, config.optimizer
    if not model.fp8_param_gather:
        return
    if not optimizer.use_distributed_optimizer:
        yield (
            "model.fp8_param_gather needs optimizer.use_distributed_optimizer, whose main parameters are cast to FP8 "
            "and gathered; set both or neither"
        )
    if model.fp8_recipe == "mxfp8" and optimizer.overlap_param_gather:
        yield (
            "model.fp8_param_gather with fp8_recipe mxfp8 gathers parameters through the gradient buffer, before the "
            "next step writes gradients there; leave optimizer.overlap_param_gather or one of them out"
        )
    if optimizer.optimizer_cpu_offload:
        yield (
            "optimizer.optimizer_cpu_offload would make main parameters of weights rounded to FP8 "
            "(model.fp8_param_gather); set one of them only"
        )
    if optimizer.use_precision_aware_optimizer and model.fp8_recipe == "delayed":
        yield (
            "optimizer.use_precision_aware_optimizer makes main parameters of FP8 weights with fp8_recipe delayed "
            "(model.fp8_param_gather); choose another recipe or the plain optimizer"
        )
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        if optimizer.use_precision_aware_optimizer and getattr(optimizer, name) in ("fp16", "fp8"):
            yield (
                f"optimizer.{name} {getattr(optimizer, name)} would go into checkpoints without its scale "
                "(model.fp8_param_gather, megatron-core 0.19); choose bf16 or fp32"
            )
    if config.train.freeze.top + config.train.freeze.bottom:
        yield (
            "model.fp8_param_gather would leave frozen layers with weights rounded to FP8 and no main parameters to "
            "save in their place; unset train.freeze or leave it out"
        )
    if config.diagnostics.weight_update.at or config.diagnostics.weight_update.every is not None:
        yield (
            "diagnostics.weight_update compares weights as checkpoints hold them, and with model.fp8_param_gather no "
            "rank has them but in FP8; unset one of them"
        )
