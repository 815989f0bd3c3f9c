"""A model's shape: preset and overrides resolved into numbers, and the parameter counts that follow from them."""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

from megacpt.config.presets import MODEL_PRESETS
from megacpt.config.tree import Model
from megacpt.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """A decoder with rotary embeddings and grouped-query attention, by default Llama's variant. Names are Megatron's.

    Attributes:
        normalization: RMSNorm, or LayerNorm, which has a bias.
        swiglu: the MLP gates with SiLU; else it has no gate, and exact GELU.
        add_bias_linear: biases on the linear layers of attention and MLP (the output layer never has one).
        rotary_percent: share of each head's channels that rotates, from the first on.
        use_parallel_residual: x + attention(norm(x)) + mlp(norm'(x)), where Llama's MLP reads what attention added.
    """

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
    normalization: str = "RMSNorm"
    swiglu: bool = True
    add_bias_linear: bool = False
    rotary_percent: float = 1.0
    use_parallel_residual: bool = False

    def padded_vocab_size(self, divisible_by: int, tensor_parallel: int) -> int:
        """Rows of the embedding after padding to a multiple of `divisible_by` x TP."""
        unit = divisible_by * tensor_parallel
        return -(-self.vocab_size // unit) * unit

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query/key/value projection."""
        return self.kv_channels * (self.num_attention_heads + 2 * self.num_query_groups)

    @property
    def fc1_size(self) -> int:
        """Rows of the MLP's first projection: gate and up, or up alone."""
        return (2 if self.swiglu else 1) * self.ffn_hidden_size

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that rotate."""
        return int(self.kv_channels * self.rotary_percent)

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm."""
        return (2 if self.normalization == "LayerNorm" else 1) * self.hidden_size

    @property
    def layer_matmul_parameters(self) -> int:
        """Parameters of one layer's matrices."""
        attention = self.hidden_size * (self.qkv_size + self.kv_channels * self.num_attention_heads)
        return attention + self.hidden_size * (self.fc1_size + self.ffn_hidden_size)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: matrices, their biases, two norms."""
        biases = self.qkv_size + self.fc1_size + 2 * self.hidden_size if self.add_bias_linear else 0
        return self.layer_matmul_parameters + biases + 2 * self.norm_parameters

    @property
    def parameters(self) -> int:
        """Parameters without vocabulary padding; a tied embedding counts once."""
        embeddings = self.vocab_size * self.hidden_size * (2 if self.untie_embeddings_and_output_weights else 1)
        return embeddings + self.num_layers * self.layer_parameters + self.norm_parameters

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
    "normalization",
    "swiglu",
    "add_bias_linear",
    "rotary_percent",
    "use_parallel_residual",
)
"""What weights fix; the rest of an architecture (rotary base, longest sequence, ...) a new run may change."""
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {f.name: f.default for f in fields(Architecture) if f.default is not MISSING}
)
"""Llama's variant: what a configuration or an older checkpoint means that does not say."""


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
    values = {**DEFAULTS, **values}
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
        UserError: query heads are no multiple of groups, or a head rotates an odd number of channels, or none.
    """
    if architecture.num_attention_heads % architecture.num_query_groups:
        raise UserError(
            f"model.num_attention_heads {architecture.num_attention_heads} is no multiple of model.num_query_groups "
            f"{architecture.num_query_groups}; choose a divisor"
        )
    if architecture.kv_channels % 2:
        raise UserError(f"model.kv_channels {architecture.kv_channels} is odd; rotary embeddings pair channels")
    rotated = architecture.rotary_channels
    if rotated % 2 or not 0 < rotated <= architecture.kv_channels:
        raise UserError(
            f"model.rotary_percent {architecture.rotary_percent:g} rotates {rotated} of a head's "
            f"{architecture.kv_channels} channels; rotary embeddings need an even number, at least two and at most all"
        )


def _even_split(hidden_size: int, heads: int) -> int:
    if hidden_size % heads:
        raise UserError(
            f"model.hidden_size {hidden_size} is no multiple of model.num_attention_heads {heads}; change one of them, "
            "or say how wide a head is with model.kv_channels"
        )
    return hidden_size // heads
