"""A model's shape: preset and overrides resolved into numbers, and the parameter counts that follow from them."""

import difflib
from dataclasses import asdict, dataclass, fields
from typing import Any

from megacpt.config.presets import MODEL_PRESETS
from megacpt.config.tree import Model
from megacpt.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """A Llama: RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases. Names are Megatron's."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    rotary_base: float
    rope_scaling_factor: float | None
    norm_epsilon: float
    untie_embeddings_and_output_weights: bool
    max_position_embeddings: int
    vocab_size: int

    def padded_vocab_size(self, divisible_by: int, tensor_parallel: int) -> int:
        """Rows of the embedding after padding to a multiple of `divisible_by` x TP."""
        unit = divisible_by * tensor_parallel
        return -(-self.vocab_size // unit) * unit

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query/key/value projection."""
        return self.kv_channels * (self.num_attention_heads + 2 * self.num_query_groups)

    @property
    def layer_matmul_parameters(self) -> int:
        """Parameters of one layer's matrices."""
        attention = self.hidden_size * (self.qkv_size + self.kv_channels * self.num_attention_heads)
        return attention + 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def parameters(self) -> int:
        """Parameters without vocabulary padding; a tied embedding counts once."""
        embeddings = self.vocab_size * self.hidden_size * (2 if self.untie_embeddings_and_output_weights else 1)
        return embeddings + self.num_layers * (self.layer_matmul_parameters + 2 * self.hidden_size) + self.hidden_size

    def flops_per_token(self, seq_length: int) -> float:
        """Forward and backward model FLOPs per token, causal half: 6 N + 6 L h s.

        N are the matmul parameters with the output layer and without the embedding lookup; h is the width of attention.
        """
        matmul = self.num_layers * self.layer_matmul_parameters + self.vocab_size * self.hidden_size
        return 6.0 * matmul + 6.0 * self.num_layers * self.kv_channels * self.num_attention_heads * seq_length


WEIGHT_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "untie_embeddings_and_output_weights",
    "vocab_size",
)
"""What weights fix; the rest of an architecture (rotary base, longest sequence, ...) a new run may change."""


@dataclass(frozen=True)
class Base:
    """The shape of the weights that a run starts from, and the file that says so."""

    architecture: Architecture
    where: str


def resolve_architecture(model: Model, tokenizer_vocab_size: int | None, base: Base | None = None) -> Architecture:
    """The preset's numbers, overridden by the keys given; vocabulary from the tokenizer where neither says.

    With `base`, that model's numbers: keys may override what weights do not fix, and a preset has to agree.

    Raises:
        UserError: unknown preset, a field that nothing gives, a shape that does not fit together, or one
            that contradicts the base.
    """
    if model.preset is not None and model.preset not in MODEL_PRESETS:
        near = difflib.get_close_matches(model.preset, MODEL_PRESETS, n=1, cutoff=0.0)[0]
        raise UserError(
            f"model.preset: no preset '{model.preset}'; the nearest is '{near}' (of {', '.join(MODEL_PRESETS)})"
        )
    values: dict[str, Any] = dict(MODEL_PRESETS[model.preset]) if model.preset else {}
    given = {f.name: v for f in fields(Architecture) if (v := getattr(model, f.name)) is not None}
    if base is not None:
        _check_base(model.preset, values | {name: given[name] for name in WEIGHT_FIELDS if name in given}, given, base)
        values = asdict(base.architecture)
    elif model.kv_channels is None and (model.hidden_size is not None or model.num_attention_heads is not None):
        values["kv_channels"] = None  # the preset's was its own hidden_size / num_attention_heads
    values |= given
    if values.get("vocab_size") is None:
        values["vocab_size"] = tokenizer_vocab_size
    values.setdefault("rope_scaling_factor", None)
    if values.get("kv_channels") is None and {"hidden_size", "num_attention_heads"} <= values.keys():
        values["kv_channels"] = _even_split(values["hidden_size"], values["num_attention_heads"])
    values.setdefault("num_query_groups", values.get("num_attention_heads"))
    missing = [f.name for f in fields(Architecture) if values.get(f.name) is None and f.name != "rope_scaling_factor"]
    if missing:
        raise UserError(
            f"model.{missing[0]} is not given; set it or choose a model.preset ({', '.join(MODEL_PRESETS)})"
        )
    architecture = Architecture(**{f.name: values[f.name] for f in fields(Architecture)})
    check_shape(architecture)
    return architecture


def _check_base(preset: str | None, claimed: dict[str, Any], given: dict[str, Any], base: Base) -> None:
    for name, value in claimed.items():
        own = getattr(base.architecture, name)
        if value is None or value == own or (name in given and name not in WEIGHT_FIELDS):
            continue
        key = f"model.{name}" if name in given else f"model.preset {preset} has {name}"
        raise UserError(f"{key} {value}, but {base.where} has {own}; drop the key, the weights bring their shape")


def check_shape(architecture: Architecture) -> None:
    """Refuse heads that do not divide.

    Raises:
        UserError: query heads are no multiple of groups, or a head has an odd number of channels.
    """
    if architecture.num_attention_heads % architecture.num_query_groups:
        raise UserError(
            f"model.num_attention_heads {architecture.num_attention_heads} is no multiple of model.num_query_groups "
            f"{architecture.num_query_groups}; choose a divisor"
        )
    if architecture.kv_channels % 2:
        raise UserError(f"model.kv_channels {architecture.kv_channels} is odd; rotary embeddings pair channels")


def _even_split(hidden_size: int, heads: int) -> int:
    if hidden_size % heads:
        raise UserError(
            f"model.hidden_size {hidden_size} is no multiple of model.num_attention_heads {heads}; change one of them, "
            "or say how wide a head is with model.kv_channels"
        )
    return hidden_size // heads
