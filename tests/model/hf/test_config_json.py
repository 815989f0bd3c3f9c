"""config.json of real models to an Architecture and back, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from megacpt.config.architecture import Base, resolve_architecture
from megacpt.config.presets import MODEL_PRESETS
from megacpt.config.tree import Model
from megacpt.errors import UserError
from megacpt.model.hf.config_json import architecture_from, config_for
from megacpt.model.hf.families import FAMILIES, LLAMA, family_for
from tests.model.hf.models import SHAPES, config_of

# Llama-3.1-8B as published, with the field names of transformers 4.
LLAMA31_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def test_a_published_config_is_its_preset() -> None:
    expected = resolve_architecture(Model(preset="llama3.1-8b"), None)
    assert architecture_from(LLAMA31_8B, "config.json") == expected


@pytest.mark.parametrize("preset", [name for name in MODEL_PRESETS if name != "tiny"])
def test_a_new_config_reads_back_here_and_in_transformers(preset: str) -> None:
    architecture = resolve_architecture(Model(preset=preset), None)
    family = family_for(architecture)
    config = config_for(architecture, None, family)
    assert architecture_from(config, "config.json") == architecture
    read = transformers.CONFIG_MAPPING[family.model_type].from_dict(dict(config)).to_dict()
    assert architecture_from(read | {"architectures": [family.architecture]}, "config.json") == architecture


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_config_of_transformers_5(kind: str, tmp_path: Path) -> None:
    config = config_of(kind).to_dict()
    architecture = architecture_from(config, "config.json")
    assert architecture.vocab_size == SHAPES[kind]["vocab_size"]
    assert (architecture.rope_scaling_factor == 8.0) == (kind == "llama3")
    assert architecture.untie_embeddings_and_output_weights == ("tied" not in kind)
    assert config_for(architecture, config, FAMILIES[config["architectures"][0]]) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "architecture Qwen2ForCausalLM is not supported"),
        ({"architectures": None, "model_type": "gpt2"}, "architecture gpt2 is not supported"),
        ({"intermediate_size": None}, "field intermediate_size is missing"),
        ({"hidden_size": "4096"}, "field hidden_size is '4096'"),
        ({"num_hidden_layers": True}, "field num_hidden_layers is True"),
        ({"tie_word_embeddings": 1}, "field tie_word_embeddings is 1, expected true or false"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is dict"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"architectures": ["MistralForCausalLM"]}, "sliding_window is 4096"),
        ({"num_key_value_heads": 5}, "no multiple of model.num_query_groups 5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE scaling of type 'linear'"),
        ({"rope_scaling": LLAMA31_8B["rope_scaling"] | {"low_freq_factor": 2.0}}, "low_freq_factor 2.0"),
        ({"rope_scaling": LLAMA31_8B["rope_scaling"] | {"factor": None}}, "lacks its factor"),
    ],
)
def test_refusals(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=r"^DIR/config\.json: ") as refusal:
        architecture_from(LLAMA31_8B | change, "DIR/config.json")
    assert words in str(refusal.value)


def test_a_window_as_long_as_the_context_is_none() -> None:
    changed = LLAMA31_8B | {"sliding_window": 131072}
    assert architecture_from(changed, "config.json") == architecture_from(LLAMA31_8B, "config.json")


def test_keys_over_a_base() -> None:
    base = Base(architecture_from(LLAMA31_8B, "config.json"), "DIR/config.json")
    assert resolve_architecture(Model(), None, base) == base.architecture
    assert resolve_architecture(Model(preset="llama3.1-8b"), None, base) == base.architecture
    longer = resolve_architecture(Model(rotary_base=1e6), None, base)
    assert longer.rotary_base == 1e6
    assert longer.rope_scaling_factor == 8.0
    with pytest.raises(UserError, match=r"model.hidden_size 64, but DIR/config.json has 4096"):
        resolve_architecture(Model(hidden_size=64), None, base)
    with pytest.raises(UserError, match=r"model.preset tiny has num_layers 4, but DIR/config.json has 32"):
        resolve_architecture(Model(preset="tiny"), None, base)
    changed = config_for(longer, LLAMA31_8B, LLAMA)
    assert changed["rope_theta"] == 1e6
    assert architecture_from(changed, "config.json") == longer
