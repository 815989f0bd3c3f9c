"""Small random models made by transformers, and what transformers computes with them: the oracle of these tests."""

from pathlib import Path
from typing import Any

import torch

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
}
COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "rms_norm_eps": 1e-5,
}


def make_model(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, max_shard: str = "150KB", **changes: Any
) -> Path:
    """Save a random model as safetensors in several files; norms are random as well."""
    import transformers

    mistral = kind == "mistral"
    config_class = transformers.MistralConfig if mistral else transformers.LlamaConfig
    model_class = transformers.MistralForCausalLM if mistral else transformers.LlamaForCausalLM
    torch.manual_seed(len(kind))
    model = model_class(config_class(**(COMMON | SHAPES[kind] | changes))).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
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
