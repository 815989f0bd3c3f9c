"""Published shapes of the Llama and GPT-NeoX families under Megatron's field names; a config can override any field."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

ModelFields = Mapping[str, Any]  # int, float, bool or None, by Megatron's name


def _llama(
    layers: int,
    hidden: int,
    ffn: int,
    heads: tuple[int, int],
    vocabulary: int | None,
    positions: int,
    **rest: float | str | None,
) -> ModelFields:
    """One shape; `heads` is (query heads, key-value heads), `rest` what differs from Llama 2's defaults."""
    shape: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads[0],
        "num_query_groups": heads[1],
        "kv_channels": hidden // heads[0],
        "rotary_base": 10_000,
        "rope_scaling_factor": None,  # null: no scaling; else Llama 3.1's, from 8,192 positions
        "norm_epsilon": 1e-5,
        "untie_embeddings_and_output_weights": True,
        "max_position_embeddings": positions,
        "vocab_size": vocabulary,  # the tokenizer's own size, before padding; null: taken from the datasets
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "rotary_percent": 1.0,
        "use_parallel_residual": False,
    }
    return MappingProxyType(shape | rest)


def _pythia(layers: int, hidden: int, heads: int) -> ModelFields:
    """One shape of the Pythia suite (Biderman et al. 2023, arXiv 2304.01373, table 1)."""
    return _llama(
        layers, hidden, 4 * hidden, (heads, heads), 50_304, 2048,
        normalization="LayerNorm", swiglu=False, add_bias_linear=True, rotary_percent=0.25, use_parallel_residual=True,
    )  # fmt: skip


# name: layers, hidden size, FFN size, (heads, key-value heads), vocabulary, positions
MODEL_PRESETS: Mapping[str, ModelFields] = MappingProxyType(
    {
        "tiny": _llama(4, 192, 512, (6, 2), None, 2048),
        "smollm2-135m": _llama(
            30, 576, 1536, (9, 3), 49_152, 8192, rotary_base=100_000, untie_embeddings_and_output_weights=False
        ),
        "tinyllama-1.1b": _llama(22, 2048, 5632, (32, 4), 32_000, 2048),
        "openllama-3b": _llama(26, 3200, 8640, (32, 32), 32_000, 2048, norm_epsilon=1e-6),
        "llama3-8b": _llama(32, 4096, 14_336, (32, 8), 128_256, 8192, rotary_base=500_000),
        "llama3.1-8b": _llama(
            32, 4096, 14_336, (32, 8), 128_256, 131_072, rotary_base=500_000, rope_scaling_factor=8.0
        ),
        "llama3.2-1b": _llama(
            16, 2048, 8192, (32, 8), 128_256, 131_072,
            rotary_base=500_000, rope_scaling_factor=32.0, untie_embeddings_and_output_weights=False,
        ),
        "llama3.2-3b": _llama(
            28, 3072, 8192, (24, 8), 128_256, 131_072,
            rotary_base=500_000, rope_scaling_factor=32.0, untie_embeddings_and_output_weights=False,
        ),
        "llama3-70b": _llama(80, 8192, 28_672, (64, 8), 128_256, 8192, rotary_base=500_000),
        "pythia-410m": _pythia(24, 1024, 16),
        "pythia-1b": _pythia(16, 2048, 8),
    }
)  # fmt: skip
