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


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def write_gguf(source: Path, folder: Path, kind: Any, **extra: Any) -> Path:
    """A Llama folder as llama.cpp's converter writes it: matrices of one quantisation, query and key rows permuted."""
    import gguf
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in (tensors_of(source) | extra).items():
        for theirs, own in GGUF_NAMES.items():
            name = name.replace(theirs, own)
        values, part = tensor.float().numpy(), name.split(".")[-2]
        if part in heads:
            halves = values.reshape(heads[part], 2, -1, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder
