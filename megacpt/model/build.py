"""From an architecture and a layout to this rank's model chunks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megacpt.config.architecture import Architecture
from megacpt.config.check_engine import attends_with_torch
from megacpt.config.tree import Freeze, Model
from megacpt.model.full_precision import is_quantized
from megacpt.model.gpt import LanguageModel
from megacpt.model.layers import RotatingSelfAttention
from megacpt.model.spec import block_spec, slots
from megacpt.runtime.engine import apex_adds_gradients


@dataclass(frozen=True)
class BuildOptions:
    """What a model needs to know besides its shape and layout.

    Attributes:
        engine: Transformer Engine's classes fill its slots.
    """

    dtype: torch.dtype
    restart_positions: bool
    engine: bool = False


def transformer_config(architecture: Architecture, model: Model, options: BuildOptions) -> TransformerConfig:
    """megacpt's keys as megatron-core's TransformerConfig."""
    on_gpu = torch.cuda.is_available()
    fill = slots(architecture, model, engine=options.engine)
    interleaved = model.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        normalization=architecture.normalization,
        layernorm_epsilon=architecture.norm_epsilon,
        # F.gelu is exact; megatron-core's fused bias and GELU (off below) would be the tanh approximation.
        activation_func=F.silu if architecture.swiglu else F.gelu,
        gated_linear_unit=architecture.swiglu,
        add_bias_linear=architecture.add_bias_linear,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=options.dtype,
        bf16=options.dtype is torch.bfloat16,
        pipeline_dtype=options.dtype,
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
        sequence_parallel=model.sequence_parallel,
        cp_comm_type=context_exchange(architecture, model, engine=options.engine),
        tp_comm_overlap=model.tp_comm_overlap,
        cross_entropy_loss_fusion=model.cross_entropy_loss_fusion and model.own_loss is None,
        cross_entropy_fusion_impl="te" if model.cross_entropy_fusion_impl == "te" else "native",
        cuda_graph_impl=model.cuda_graph_impl,
        cuda_graph_modules=[],
        recompute_granularity=model.recompute_granularity,
        recompute_modules=None if model.recompute_modules is None else list(model.recompute_modules),
        recompute_method=model.recompute_method,
        recompute_num_layers=model.recompute_num_layers,
        # The interleaved schedule swaps activations at PP=2 with batched p2p on gloo; this pair is exact everywhere.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        calculate_per_token_loss=True,
        # megacpt.model.init draws the weights, whole and layout-independent. Zeros where a weight is quantised as soon
        # as it is there: what memory happened to hold would count in delayed scaling's history of maxima.
        perform_initialization=model.fp8_param_gather,
        init_method=torch.nn.init.zeros_ if model.fp8_param_gather else None,
        output_layer_init_method=torch.nn.init.zeros_ if model.fp8_param_gather else None,
        use_cpu_initialization=not on_gpu,
        # megatron-core's own linear layers need apex for it; Transformer Engine's are told in `build_chunks`.
        gradient_accumulation_fusion=model.gradient_accumulation_fusion and apex_adds_gradients(),
        bias_activation_fusion=options.engine and architecture.swiglu and fill.activation is None,
        use_te_activation_func=fill.activation is not None,
        apply_rope_fusion=options.engine and fill.self_attention is not RotatingSelfAttention,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        attention_backend=AttnBackend[model.attention_backend],
        **fp8_settings(model),
    )


def context_exchange(architecture: Architecture, model: Model, *, engine: bool) -> str | None:
    """How context-parallel ranks exchange keys and values; None without them."""
    if model.context_parallel_size == 1:
        return None
    by_default = "all_gather" if attends_with_torch(architecture, model, engine=engine) else "p2p"
    return model.cp_comm_type or by_default


def fp8_settings(model: Model) -> dict[str, Any]:
    """The keys of FP8 as megatron-core's TransformerConfig has them; nothing without FP8."""
    if model.fp8 is None:
        return {}
    return {
        "fp8": model.fp8,
        "fp8_recipe": model.fp8_recipe,
        "fp8_param": model.fp8_param_gather,
        "fp8_margin": model.fp8_margin,
        "fp8_amax_history_len": model.fp8_amax_history_len,
        "fp8_amax_compute_algo": model.fp8_amax_compute_algo,
        "first_last_layers_bf16": model.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": model.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": model.num_layers_at_end_in_bf16,
    }


def build_chunks(
    architecture: Architecture, model: Model, config: TransformerConfig, options: BuildOptions
) -> list[LanguageModel]:
    """This rank's model: one chunk, or one per virtual pipeline stage. Parameters are not initialised."""
    virtual = model.virtual_pipeline_model_parallel_size
    padded = architecture.padded_vocab_size(model.make_vocab_size_divisible_by, model.tensor_model_parallel_size)
    chunks = []
    for stage in range(virtual or 1):
        vp_stage = stage if virtual else None
        chunk = LanguageModel(
            architecture,
            config,
            options.restart_positions,
            options.engine,
            model.own_loss,
            transformer_layer_spec=block_spec(
                architecture, model, get_num_layers_to_build(config, vp_stage=vp_stage), engine=options.engine
            ),
            vocab_size=padded,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        chunks.append(_placed(chunk, options.dtype))
    if model.gradient_accumulation_fusion:
        for module in (module for chunk in chunks for module in chunk.modules()):
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True
    return chunks


def _placed(chunk: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """On this rank's device and in the model's dtype.

    FP8 parameters have been built so, and keep what is attached to them only if nothing moves them.
    """
    quantized = [parameter for parameter in chunk.parameters() if is_quantized(parameter)]
    if not quantized:
        return chunk.to(torch.cuda.current_device(), dtype)
    for parameter in quantized:
        # Where Transformer Engine kept what it drew, megatron-core would make main parameters of that.
        for name in ("get_high_precision_init_val", "clear_high_precision_init_val", "_high_precision_init_val"):
            if hasattr(parameter, name):
                delattr(parameter, name)
    for module in chunk.modules():
        if not any(is_quantized(parameter) for parameter in module.parameters(recurse=False)):
            module._apply(lambda t: t.to(torch.cuda.current_device(), dtype if t.is_floating_point() else None), False)
    return chunk


@contextmanager
def without_fp8(chunks: Sequence[LanguageModel]) -> Iterator[None]:
    """In the model's own dtype, to be compared with another implementation."""
    config = chunks[0].config
    fp8 = config.fp8
    config.fp8 = None
    try:
        yield
    finally:
        config.fp8 = fp8


@contextmanager
def without_userbuffers(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """With ordinary communication, for batches of another shape, or dtype, than the buffers of tp_comm_overlap.

    Without gradients the scatter after a forward's matmul is all that goes through them.
    """
    modules: list[Any] = [module for chunk in chunks for module in chunk.modules()]
    overlapping = [module for module in modules if getattr(module, "ub_overlap_rs_fprop", False)]
    for module in overlapping:
        module.ub_overlap_rs_fprop = False
    try:
        yield
    finally:
        for module in overlapping:
            module.ub_overlap_rs_fprop = True


def freeze_layers(chunks: list[LanguageModel], freeze: Freeze) -> int:
    """Stop gradients into the parameters of the outermost layers; returns how many layers of this rank it froze."""
    frozen = 0
    for chunk in chunks:
        chunk.some_layers_frozen = freeze.bottom + freeze.top > 0
        for layer in chunk.decoder.layers:
            position = layer.layer_number - 1
            if position < freeze.bottom or position >= chunk.config.num_layers - freeze.top:
                layer.requires_grad_(False)
                frozen += 1
    return frozen


def slot_classes(chunk: LanguageModel) -> dict[str, str]:
    """The class in every slot of the layer spec, for the start-up report and tests."""
    layer = chunk.decoder.layers[0]
    slots = {
        "layer": layer,
        "input_layernorm": layer.input_layernorm,
        "linear_qkv": layer.self_attention.linear_qkv,
        "core_attention": layer.self_attention.core_attention,
        "linear_proj": layer.self_attention.linear_proj,
        "pre_mlp_layernorm": layer.pre_mlp_layernorm,
        "self_attention": layer.self_attention,
        "linear_fc1": layer.mlp.linear_fc1,
        "linear_fc2": layer.mlp.linear_fc2,
    }
    if isinstance(layer.mlp.activation_func, torch.nn.Module):
        slots["activation_func"] = layer.mlp.activation_func
    return {slot: f"{type(module).__module__}.{type(module).__qualname__}" for slot, module in slots.items()}
