"""What differs between model families, as tables: configuration fields and tensors. Import, export and gate read them.

A new family is a new table here. A fused Megatron tensor lists its Hugging Face parts and how their rows are laid out;
the shape of a part is written in named sizes (`sizes`). Megatron's names are those of checkpoints (megacpt.model.spec).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, NamedTuple

from megacpt.config.architecture import Architecture
from megacpt.errors import UserError
from megacpt.model.hf.rows import Layout, grouped, stacked
from megacpt.model.spec import CHECKPOINT_NAMES


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor: its name, with {layer} where layers have their own, and its shape in named sizes."""

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Weight:
    """A Megatron tensor and the Hugging Face parts that its rows are made of; `needs_untied`: absent where tied."""

    key: str
    parts: tuple[Part, ...]
    rows: Literal["stacked", "grouped"] = "stacked"
    needs_untied: bool = False

    @property
    def in_layer(self) -> bool:
        """Whether every layer has one; Megatron's tensor then begins with an axis of layers."""
        return "{layer}" in self.parts[0].name

    def layout(self, architecture: Architecture) -> Layout:
        """Rows of the fused tensor as spans of the parts."""
        counts = [shape_of(part, architecture)[0] for part in self.parts]
        return grouped(counts, architecture.num_query_groups) if self.rows == "grouped" else stacked(counts)


class Home(NamedTuple):
    """Where a Hugging Face tensor lives: part number `part` of a weight, in a layer if layers have their own."""

    weight: Weight
    part: int
    layer: int | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Field:
    """An Architecture field under its Hugging Face name; `derive` gives an absent one from the fields above it."""

    ours: str
    theirs: str
    kind: type
    derive: Callable[[Mapping[str, Any]], Any] | None = None
    negated: bool = False


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    Attributes:
        architecture: as config.json's `architectures` says it.
        absent: what transformers takes where config.json is silent on a field that matters here.
        fixed: fields that megacpt's model has no choice in, with the values that mean the same as having none.
        ignored: endings of tensor names that hold nothing a model learns.
    """

    architecture: str
    model_type: str
    fields: tuple[Field, ...]
    weights: tuple[Weight, ...]
    absent: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]]
    ignored: tuple[str, ...] = ()
    decoder: str = "model.layers"

    def weights_of(self, architecture: Architecture) -> list[Weight]:
        """The weights that a model of this shape has."""
        untied = architecture.untie_embeddings_and_output_weights
        return [weight for weight in self.weights if untied or not weight.needs_untied]

    def tensors(self, architecture: Architecture) -> dict[str, Home]:
        """Every Hugging Face tensor of a model of this shape, by name, in the order of the table and of the layers."""
        found: dict[str, Home] = {}
        for in_layer, weights in groupby(self.weights_of(architecture), lambda weight: weight.in_layer):
            group = list(weights)
            for layer in range(architecture.num_layers) if in_layer else [None]:
                for weight in group:
                    for number, part in enumerate(weight.parts):
                        home = Home(weight, number, layer, shape_of(part, architecture))
                        found[part.name.format(layer=layer)] = home
        return found


def checkpoint_key(key: str) -> str:
    """A key with Megatron's local names (norms apart from the linear layers) as Transformer Engine names it."""
    for local, fused in CHECKPOINT_NAMES.items():
        key = key.replace(f".{local}", f".{fused}")
    return key


def sizes(architecture: Architecture) -> dict[str, int]:
    """The named sizes that shapes are written in."""
    return {
        "vocabulary": architecture.vocab_size,
        "hidden": architecture.hidden_size,
        "ffn": architecture.ffn_hidden_size,
        "queries": architecture.num_attention_heads * architecture.kv_channels,
        "keys": architecture.num_query_groups * architecture.kv_channels,
    }


def shape_of(part: Part, architecture: Architecture) -> tuple[int, ...]:
    """A part's shape in numbers."""
    named = sizes(architecture)
    return tuple(named[name] for name in part.shape)


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
FAMILIES: Mapping[str, Family] = {family.architecture: family for family in (LLAMA, MISTRAL)}


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
