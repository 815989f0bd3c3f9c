"""What differs between model families, as tables: configuration fields and tensors. Import, export and gate read them.

A new family is a new table here, in the terms of `megacpt.model.hf.table`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megacpt.config.architecture import DEFAULTS, Architecture
from megacpt.errors import UserError
from megacpt.model.hf.table import Family, Field, Part, Rotary, Weight

LAYER, MEGATRON_LAYER = "model.layers.{layer}.", "decoder.layers."
LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    fields=(
        Field("num_layers", "num_hidden_layers", int),
        Field("hidden_size", "hidden_size", int),
        Field("ffn_hidden_size", "intermediate_size", int),
        Field("num_attention_heads", "num_attention_heads", int),
        Field("num_query_groups", "num_key_value_heads", int, lambda known: known["num_attention_heads"]),
        Field("kv_channels", "head_dim", int, lambda known: known["hidden_size"] // known["num_attention_heads"]),
        Field("norm_epsilon", "rms_norm_eps", float),
        Field("untie_embeddings_and_output_weights", "tie_word_embeddings", bool, lambda known: True, negated=True),
        Field("max_position_embeddings", "max_position_embeddings", int),
        Field("vocab_size", "vocab_size", int),
    ),
    weights=(
        Weight("embedding.word_embeddings.weight", (Part("model.embed_tokens.weight", ("vocabulary", "hidden")),)),
        Weight(
            MEGATRON_LAYER + "self_attention.linear_qkv.layer_norm_weight",
            (Part(LAYER + "input_layernorm.weight", ("hidden",)),),
        ),
        Weight(
            MEGATRON_LAYER + "self_attention.linear_qkv.weight",
            (
                Part(LAYER + "self_attn.q_proj.weight", ("queries", "hidden")),
                Part(LAYER + "self_attn.k_proj.weight", ("keys", "hidden")),
                Part(LAYER + "self_attn.v_proj.weight", ("keys", "hidden")),
            ),
            rows="grouped",
        ),
        Weight(
            MEGATRON_LAYER + "self_attention.linear_proj.weight",
            (Part(LAYER + "self_attn.o_proj.weight", ("hidden", "queries")),),
        ),
        Weight(
            MEGATRON_LAYER + "mlp.linear_fc1.layer_norm_weight",
            (Part(LAYER + "post_attention_layernorm.weight", ("hidden",)),),
        ),
        Weight(
            MEGATRON_LAYER + "mlp.linear_fc1.weight",
            (
                Part(LAYER + "mlp.gate_proj.weight", ("ffn", "hidden")),
                Part(LAYER + "mlp.up_proj.weight", ("ffn", "hidden")),
            ),
        ),
        Weight(
            MEGATRON_LAYER + "mlp.linear_fc2.weight", (Part(LAYER + "mlp.down_proj.weight", ("hidden", "ffn")),)
        ),
        Weight("decoder.final_layernorm.weight", (Part("model.norm.weight", ("hidden",)),)),
        Weight(
            "output_layer.weight", (Part("lm_head.weight", ("vocabulary", "hidden")),), needs_untied=True
        ),
    ),
    constants={
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "rotary_percent": 1.0,
        "use_parallel_residual": False,
    },
    absent={"hidden_act": "silu"},
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "quantization_config": (None,),
    },
    ignored=("rotary_emb.inv_freq",),
)  # fmt: skip
MISTRAL = replace(
    LLAMA,
    architecture="MistralForCausalLM",
    model_type="mistral",
    absent={**LLAMA.absent, "sliding_window": 4096},
)
NEOX_LAYER = "gpt_neox.layers.{layer}."


def _affine(key: str, name: str, rows: str, *columns: str, joint: str = ".") -> tuple[Weight, Weight]:
    """A matrix or a norm with its bias; `joint` stands before `weight` and `bias` in Megatron's name."""
    return (
        Weight(f"{key}{joint}weight", (Part(f"{name}.weight", (rows, *columns)),)),
        Weight(f"{key}{joint}bias", (Part(f"{name}.bias", (rows,)),)),
    )


# The fused query_key_value has for each head its query, key and value: Megatron's order where every head is a group.
NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    fields=(
        Field("num_layers", "num_hidden_layers", int),
        Field("hidden_size", "hidden_size", int),
        Field("ffn_hidden_size", "intermediate_size", int),
        Field("num_attention_heads", "num_attention_heads", int),
        Field("num_query_groups", None, int, lambda known: known["num_attention_heads"]),
        Field("kv_channels", None, int, lambda known: known["hidden_size"] // known["num_attention_heads"]),
        Field("norm_epsilon", "layer_norm_eps", float, lambda known: 1e-5),
        Field("use_parallel_residual", "use_parallel_residual", bool, lambda known: True),
        Field("untie_embeddings_and_output_weights", "tie_word_embeddings", bool, lambda known: True, negated=True),
        Field("max_position_embeddings", "max_position_embeddings", int),
        Field("vocab_size", "vocab_size", int),
    ),
    weights=(
        Weight("embedding.word_embeddings.weight", (Part("gpt_neox.embed_in.weight", ("vocabulary", "hidden")),)),
        *_affine(
            MEGATRON_LAYER + "self_attention.linear_qkv.layer_norm", NEOX_LAYER + "input_layernorm", "hidden", joint="_"
        ),
        *_affine(
            MEGATRON_LAYER + "self_attention.linear_qkv", NEOX_LAYER + "attention.query_key_value", "qkv", "hidden"
        ),
        *_affine(MEGATRON_LAYER + "self_attention.linear_proj", NEOX_LAYER + "attention.dense", "hidden", "queries"),
        *_affine(
            MEGATRON_LAYER + "mlp.linear_fc1.layer_norm", NEOX_LAYER + "post_attention_layernorm", "hidden", joint="_"
        ),
        *_affine(MEGATRON_LAYER + "mlp.linear_fc1", NEOX_LAYER + "mlp.dense_h_to_4h", "ffn", "hidden"),
        *_affine(MEGATRON_LAYER + "mlp.linear_fc2", NEOX_LAYER + "mlp.dense_4h_to_h", "hidden", "ffn"),
        *_affine("decoder.final_layernorm", "gpt_neox.final_layer_norm", "hidden"),
        Weight("output_layer.weight", (Part("embed_out.weight", ("vocabulary", "hidden")),), needs_untied=True),
    ),
    constants={"normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True},
    absent={"hidden_act": "gelu", "attention_bias": True},
    fixed={"hidden_act": ("gelu",), "attention_bias": (None, True), "quantization_config": (None,)},
    rotary=Rotary(base="rotary_emb_base", percent="rotary_pct", absent_percent=0.25),
    # Causal masks and rotary frequencies, which old versions of transformers saved.
    ignored=("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
    renamed={"lm_head.weight": "embed_out.weight"},
    decoder="gpt_neox.layers",
)
FAMILIES: Mapping[str, Family] = {family.architecture: family for family in (LLAMA, MISTRAL, NEOX)}


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The table of a config.json.

    Raises:
        UserError: `architectures` names none, or one that has no table.
    """
    named = config.get("architectures") or []
    name = named[0] if isinstance(named, list) and named else None
    if name is None:
        # Old conversion scripts leave it out.
        name = next((f.architecture for f in FAMILIES.values() if f.model_type == config.get("model_type")), None)
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"{where}: architecture {name or config.get('model_type') or 'unnamed'} is not supported; "
            f"megacpt imports {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def family_for(architecture: Architecture) -> Family:
    """The table to export a shape with that no config.json came with.

    Raises:
        UserError: no supported Hugging Face architecture has its combination of features.
    """
    for family in FAMILIES.values():
        if family.expresses(architecture):
            return family
    features = {name: getattr(architecture, name) for name in (*DEFAULTS, "num_query_groups", "kv_channels")}
    raise UserError(
        f"none of {', '.join(FAMILIES)} has this combination of model keys: "
        f"{', '.join(f'{name} {value}' for name, value in features.items())}; it cannot be exported"
    )
