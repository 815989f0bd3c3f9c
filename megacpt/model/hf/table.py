"""The terms that a model family is described in: configuration fields, and tensors with their parts and rows.

A fused Megatron tensor lists its Hugging Face parts and how their rows are laid out; the shape of a part is written in
named sizes (`sizes`). Megatron's names are those of checkpoints (megacpt.model.spec).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, Literal, NamedTuple

from megacpt.config.architecture import Architecture
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
    """An Architecture field under its Hugging Face name; `derive` gives an absent one from the fields above it.

    A family whose configuration has no such field leaves `theirs` out: the field is what `derive` gives.
    """

    ours: str
    theirs: str | None
    kind: type
    derive: Callable[[Mapping[str, Any]], Any] | None = None
    negated: bool = False


class Rotary(NamedTuple):
    """Hugging Face names of RoPE's base and of the rotating share of each head (None: all), and the latter's default.

    transformers 4 has them beside the other fields, transformers 5 as rope_theta and partial_rotary_factor.
    """

    base: str = "rope_theta"
    percent: str | None = None
    absent_percent: float = 1.0


LLAMA_ROTARY = Rotary()


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    Attributes:
        architecture: as config.json's `architectures` says it.
        constants: fields of Architecture that all models of the family share.
        absent: what transformers takes where config.json is silent on a field that matters here.
        fixed: fields that megacpt's model has no choice in, with the values that mean the same as having none.
        ignored: endings of tensor names that hold nothing a model learns.
        renamed: parameters of transformers' modules that files hold under another name.
    """

    architecture: str
    model_type: str
    fields: tuple[Field, ...]
    weights: tuple[Weight, ...]
    constants: Mapping[str, Any]
    absent: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]]
    rotary: Rotary = LLAMA_ROTARY
    ignored: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    decoder: str = "model.layers"

    def expresses(self, architecture: Architecture) -> bool:
        """Whether this family's config.json can say all of a shape."""
        values = asdict(architecture)
        derived = {f.ours: f.derive(values) for f in self.fields if f.theirs is None and f.derive is not None}
        return all(values[name] == value for name, value in {**self.constants, **derived}.items())

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
        "qkv": architecture.qkv_size,
    }


def shape_of(part: Part, architecture: Architecture) -> tuple[int, ...]:
    """A part's shape in numbers."""
    named = sizes(architecture)
    return tuple(named[name] for name in part.shape)
