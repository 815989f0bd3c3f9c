"""Small random models made by transformers, and what transformers computes with them: the oracle of these tests."""

from pathlib import Path
from typing import Any

import torch

PYTHIA_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.34}
"""4 of a head's 12 channels rotate."""
SHAPES: dict[str, dict[str, Any]] = {
    "llama3": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131_072,
        "vocab_size": 1003,
    },
    "openllama": {"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "vocab_size": 1024},
    "tinyllama": {"num_key_value_heads": 2, "vocab_size": 640},
    "tied": {"num_key_value_heads": 2, "vocab_size": 1003, "tie_word_embeddings": True, "head_dim": 16},
    "mistral": {"num_key_value_heads": 2, "vocab_size": 768, "sliding_window": None},
    "pythia": {"vocab_size": 1003, "rope_parameters": PYTHIA_ROPE},
    "pythia-sequential": {
        "layer_norm_eps": 1e-4,
        "vocab_size": 768,
        "rope_parameters": PYTHIA_ROPE | {"partial_rotary_factor": 0.5, "rope_theta": 5000.0},
        "use_parallel_residual": False,
    },
    "pythia-tied": {"vocab_size": 1003, "rope_parameters": PYTHIA_ROPE, "tie_word_embeddings": True},
}
MODEL_TYPES = {"mistral": "mistral", "pythia": "gpt_neox"}
"""By how the kind begins; else Llama."""
COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}


def config_of(kind: str, **changes: Any) -> Any:
    """transformers' configuration of a kind, which knows its model's class."""
    import transformers

    model_type = MODEL_TYPES.get(kind.split("-")[0], "llama")
    epsilon = {"layer_norm_eps" if model_type == "gpt_neox" else "rms_norm_eps": 1e-5}
    config = transformers.CONFIG_MAPPING[model_type](**(COMMON | epsilon | SHAPES[kind] | changes))
    config.architectures = [transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    return config


def make_model(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, max_shard: str = "150KB", **changes: Any
) -> Path:
    """Save a random model as safetensors in several files; norms and biases are random as well."""
    import transformers

    torch.manual_seed(len(kind))
    model = transformers.AutoModelForCausalLM.from_config(config_of(kind, **changes)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=max_shard)
    return folder


def transformers_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """fp32 logits [n, s, vocabulary]."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a folder's safetensors files."""
    import safetensors.torch

    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found
