"""The presets' numbers against the published parameter totals."""

import pytest

from megacpt.config.architecture import DEFAULTS, resolve_architecture
from megacpt.config.presets import MODEL_PRESETS, ModelFields
from megacpt.config.tree import Model
from megacpt.errors import UserError

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
    "openllama-3b": 3_426_473_600,
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3-70b": 70_553_706_496,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
}


def parameters(preset: ModelFields, vocabulary: int) -> int:
    hidden, ffn = preset["hidden_size"], preset["ffn_hidden_size"]
    queries = preset["num_attention_heads"] * preset["kv_channels"]
    keys = preset["num_query_groups"] * preset["kv_channels"]
    layer = hidden * (2 * queries + 2 * keys) + (3 if preset["swiglu"] else 2) * hidden * ffn
    if preset["add_bias_linear"]:
        layer += queries + 2 * keys + hidden + ffn + hidden
    norm = {"RMSNorm": hidden, "LayerNorm": 2 * hidden}[preset["normalization"]]
    tables = 2 if preset["untie_embeddings_and_output_weights"] else 1
    return preset["num_layers"] * (layer + 2 * norm) + norm + tables * vocabulary * hidden


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name: str) -> None:
    assert parameters(MODEL_PRESETS[name], MODEL_PRESETS[name]["vocab_size"]) == PUBLISHED[name]
    assert resolve_architecture(Model(preset=name), None).parameters == PUBLISHED[name]


def test_tiny_has_three_million_parameters_and_splits_in_two() -> None:
    tiny = MODEL_PRESETS["tiny"]
    assert parameters(tiny, 4096) == 3_147_456
    assert tiny["num_attention_heads"] % 2 == tiny["num_query_groups"] % 2 == tiny["num_layers"] % 2 == 0


def test_presets_agree_on_their_fields_and_cannot_be_changed() -> None:
    fields = {frozenset(preset) for preset in MODEL_PRESETS.values()}
    assert len(fields) == 1
    assert all(p["num_attention_heads"] % p["num_query_groups"] == 0 for p in MODEL_PRESETS.values())
    with pytest.raises(TypeError):
        MODEL_PRESETS["tiny"]["num_layers"] = 5  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "base", "factor", "epsilon", "positions"),
    [
        ("tiny", 10_000, None, 1e-5, 2048),
        ("smollm2-135m", 100_000, None, 1e-5, 8192),
        ("tinyllama-1.1b", 10_000, None, 1e-5, 2048),
        ("openllama-3b", 10_000, None, 1e-6, 2048),
        ("llama3-8b", 500_000, None, 1e-5, 8192),
        ("llama3.1-8b", 500_000, 8.0, 1e-5, 131_072),
        ("llama3.2-1b", 500_000, 32.0, 1e-5, 131_072),
        ("llama3.2-3b", 500_000, 32.0, 1e-5, 131_072),
        ("llama3-70b", 500_000, None, 1e-5, 8192),
        ("pythia-410m", 10_000, None, 1e-5, 2048),
        ("pythia-1b", 10_000, None, 1e-5, 2048),
    ],
)
def test_what_the_parameter_count_does_not_show(
    name: str, base: int, factor: float | None, epsilon: float, positions: int
) -> None:
    preset = MODEL_PRESETS[name]
    found = tuple(
        preset[key] for key in ("rotary_base", "rope_scaling_factor", "norm_epsilon", "max_position_embeddings")
    )
    assert found == (base, factor, epsilon, positions)


def test_a_preset_is_llama_or_neox() -> None:
    for name, preset in MODEL_PRESETS.items():
        variant = {field: preset[field] for field in DEFAULTS}
        neox = {"normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True, "use_parallel_residual": True}
        assert variant == ({**neox, "rotary_percent": 0.25} if name.startswith("pythia") else DEFAULTS)


def test_keys_change_the_variant_and_the_counts_with_it() -> None:
    plain = resolve_architecture(Model(preset="tiny"), 4096)
    biased = resolve_architecture(Model(preset="tiny", add_bias_linear=True, normalization="LayerNorm"), 4096)
    ungated = resolve_architecture(Model(preset="tiny", swiglu=False), 4096)
    rows = plain.qkv_size + 2 * 512 + 2 * 192
    assert biased.parameters - plain.parameters == 4 * rows + 9 * 192
    assert biased.flops_per_token(64) == plain.flops_per_token(64)
    assert plain.parameters - ungated.parameters == 4 * 192 * 512
    assert plain.flops_per_token(64) - ungated.flops_per_token(64) == 6 * 4 * 192 * 512


@pytest.mark.parametrize("percent", [0.01, 0.1, 1.5])
def test_a_head_has_to_rotate_an_even_number_of_its_channels(percent: float) -> None:
    with pytest.raises(UserError, match=r"model\.rotary_percent .* channels; rotary embeddings need an even number"):
        resolve_architecture(Model(preset="tiny", rotary_percent=percent), 4096)
