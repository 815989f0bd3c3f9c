"""What one transformer layer saves for the backward pass of one micro-batch on one rank, by part.

Bytes per token in the manner of Korthikanti et al. 2022 (arXiv 2205.05198, 4.1), with d bytes an element, h hidden,
f FFN, H heads and G query groups of D channels, t = TP, and u = t with sequence parallelism, else 1:

                          local                    Transformer Engine
    2 norms               2 (d h + 4) / u          the same: input, fp32 inverse root mean square; LayerNorm: mean
    inputs of qkv, fc1    2 d h / u                2 q h / u; neither where frozen: needed for weight gradients only
    fused qkv             d D (H + 2 G) / t        the same: held whole by its view, the values; with t > G of all ranks
    query, key            d D (H + max(G, t)) / t  the same, after RoPE
    attention             d D H / t + 4 H / t      the same: output, fp32 log-sum-exp, no scores; FP8: + D H / t
    SwiGLU                4 d f / t                2 d f / t: gate and up; local: silu(gate), up + glu_linear_offset too
    input of fc2          d f / t                  q f / t (not where frozen)

q is d, and 1 in a layer whose matmuls are in FP8 (with scales 33/32 under blockwise and mxfp8); the output of attention
is then there twice. The local layer keeps cosines and sines, 4 s d D, and with documents a mask. An MLP without a gate
saves GELU's input, d f / t, in place of SwiGLU's. Our SwiGLU and RoPE save what Transformer Engine's do: for RoPE the
angles, once for all layers. Under a parallel residual the norms share their input.

Tokens are those of a rank, 1 / CP of a sequence's. Torch's attention then keeps gathered keys and values, 2 d D G / t
of each token of the whole sequence, instead of its own and the fused qkv, and its output twice (not where frozen). With
`core_attn` recomputed it gathers them again.

The local column was read off `torch.autograd.graph.saved_tensors_hooks`, and a test holds it against a CPU run. The
other one was read off Transformer Engine's sources (2.20) and has not been measured.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megacpt.train.memory import FP32, Setting, is_fp8

SCALED_RECIPES = ("blockwise", "mxfp8")


@dataclass(frozen=True)
class LayerBytes:
    """Bytes by what selective recomputation can drop.

    Attributes:
        stream: inputs of the norms, which stay whatever is recomputed.
        norms: what else norms save, and the output of the first, kept as the input of qkv.
        fc1_input: the output of the second (`mlp` where that norm is inside the MLP).
        attention: queries, keys, values and the output, which stay.
        core: what attention alone needs (`core_attn`).
        mlp: the MLP's activation and the input of fc2 (`mlp`).
    """

    stream: int
    norms: int
    fc1_input: int
    attention: int
    core: int
    mlp: int


def layer_bytes(setting: Setting, number: int) -> LayerBytes:
    """What layer `number` (0, 1, ... of the whole model) saves if nothing is recomputed."""
    trains, item, tokens = setting.trains(number), setting.dtype.itemsize, tokens_of(setting)
    shape, tp = setting.architecture, setting.layout.tensor
    hidden, ffn = shape.hidden_size // sequence_shards(setting), shape.ffn_hidden_size // tp
    heads, channels = shape.num_attention_heads // tp, shape.kv_channels
    keys = max(shape.num_query_groups // tp, 1)
    gathered = tp > shape.num_query_groups
    mixed = shape.qkv_size // (1 if gathered else tp)
    fp8 = is_fp8(setting, number)
    linear_input = _input_bytes(setting, number) if trains else _nothing
    again = linear_input(channels * heads * tokens) if fp8 else 0
    inputs = 1 if shape.use_parallel_residual else 2
    if gathers_keys(setting) and "core_attn" not in recomputed_modules(setting):
        outputs = 2 if trains and not fp8 else 1
        attention = channels * ((1 + outputs) * heads + 2 * keys * setting.layout.context)
    else:
        attention = mixed + channels * (2 * heads + keys)
    return LayerBytes(
        stream=inputs * tokens * norm_input(setting),
        norms=2 * tokens * norm_own(setting) + linear_input(hidden * tokens),
        fc1_input=linear_input(hidden * tokens),
        attention=tokens * item * attention + again + _phases(setting),
        core=tokens * FP32 * heads + _mask(setting),
        mlp=tokens * item * activation_inputs(setting) * ffn + linear_input(ffn * tokens),
    )


def kept(setting: Setting, layer: LayerBytes) -> int:
    """What is left of a layer under the configured selective recomputation (all of it without)."""
    total = layer.stream + layer.norms + layer.fc1_input + layer.attention + layer.core + layer.mlp
    return total - dropped(setting, layer)


def dropped(setting: Setting, layer: LayerBytes) -> int:
    """What selective recomputation drops and brings back in the layer's backward."""
    modules = recomputed_modules(setting)
    lost = layer.core if "core_attn" in modules else 0
    if "mlp" in modules:
        lost += layer.mlp
        if setting.engine:
            # Its norm is inside the MLP, whose input is the residual stream.
            lost += layer.fc1_input
    return lost


def recomputed_modules(setting: Setting) -> tuple[str, ...]:
    """What selective recomputation is about; megatron-core's default is attention's core."""
    model = setting.config.model
    if model.recompute_granularity != "selective":
        return ()
    return tuple(model.recompute_modules) if model.recompute_modules is not None else ("core_attn",)


def tokens_of(setting: Setting) -> int:
    """Tokens of a micro-batch on a rank, before sequence parallelism."""
    return setting.config.train.micro_batch_size * setting.config.data.seq_length // setting.layout.context


def gathers_keys(setting: Setting) -> bool:
    """Whether torch's attention has keys and values of all context-parallel ranks."""
    return setting.layout.context > 1 and setting.attends_with_torch


def gathered_keys_bytes(setting: Setting) -> int:
    """Keys and values of a micro-batch's whole sequences, in one layer."""
    shape = setting.architecture
    groups = max(shape.num_query_groups // setting.layout.tensor, 1)
    return tokens_of(setting) * setting.layout.context * 2 * groups * shape.kv_channels * setting.dtype.itemsize


def attention_output(setting: Setting) -> int:
    """What attention gives of a micro-batch in one layer."""
    shape = setting.architecture
    heads = shape.num_attention_heads // setting.layout.tensor
    return tokens_of(setting) * heads * shape.kv_channels * setting.dtype.itemsize


def causal_masks(setting: Setting) -> int:
    """Of the chunks that context-parallel ranks have, once for all layers; a GPU's attention needs none."""
    if not gathers_keys(setting) or setting.on_gpu or setting.config.data.reset_attention_mask:
        return 0
    return _chunk_pairs(setting) * setting.dtype.itemsize


def _chunk_pairs(setting: Setting) -> int:
    """Pairs of a position of a rank and one up to the end of its chunk."""
    chunks = 2 * setting.layout.context
    return (chunks + 1) * (setting.config.data.seq_length // chunks) ** 2


def sequence_shards(setting: Setting) -> int:
    """Ranks that share the residual stream's positions."""
    return setting.layout.tensor if setting.config.model.sequence_parallel else 1


def norm_input(setting: Setting) -> int:
    """Bytes per token of a norm's input."""
    return setting.architecture.hidden_size * setting.dtype.itemsize // sequence_shards(setting)


def norm_own(setting: Setting) -> int:
    """Bytes per token that a norm saves beside its input."""
    numbers = 2 if setting.architecture.normalization == "LayerNorm" else 1
    return numbers * FP32 // sequence_shards(setting)


def _input_bytes(setting: Setting, number: int) -> Callable[[int], int]:
    """From elements of a linear layer's saved input to bytes."""
    if not is_fp8(setting, number):
        return lambda elements: elements * setting.dtype.itemsize
    if setting.config.model.fp8_recipe in SCALED_RECIPES:
        return lambda elements: elements * 33 // 32
    return lambda elements: elements


def _nothing(elements: int) -> int:
    return 0


def activation_inputs(setting: Setting) -> int:
    """Tensors as wide as the MLP's hidden layer that its activation saves."""
    if not setting.architecture.swiglu:
        return 1
    return 2 if setting.engine or setting.own_swiglu else 4


def _phases(setting: Setting) -> int:
    """Cosines and sines of query and key; a fused RoPE keeps angles that all layers share."""
    fused = setting.engine or setting.own_rope
    return 0 if fused else 4 * angles(setting) // FP32 * setting.dtype.itemsize


def angles(setting: Setting) -> int:
    """Rotary angles, for each sample its own where they restart with documents."""
    data = setting.config.data
    rows = setting.config.train.micro_batch_size if data.reset_position_ids and not setting.engine else 1
    return data.seq_length // setting.layout.context * setting.architecture.rotary_channels * FP32 * rows


def _mask(setting: Setting) -> int:
    """The mask that follows documents, as attention adds it; packed documents need none."""
    data = setting.config.data
    if setting.engine or not data.reset_attention_mask:
        return 0
    pairs = _chunk_pairs(setting) if gathers_keys(setting) else data.seq_length**2
    return setting.config.train.micro_batch_size * pairs * setting.dtype.itemsize
