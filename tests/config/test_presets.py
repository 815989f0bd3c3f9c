"""The presets' numbers against the published parameter totals."""

import pytest

from megacpt.config.presets import MODEL_PRESETS, ModelFields

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
    "openllama-3b": 3_426_473_600,
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3-70b": 70_553_706_496,
}


def parameters(preset: ModelFields, vocabulary: int) -> int:
    hidden, ffn = preset["hidden_size"], preset["ffn_hidden_size"]
    queries = preset["num_attention_heads"] * preset["kv_channels"]
    keys = preset["num_query_groups"] * preset["kv_channels"]
    layer = hidden * (2 * queries + 2 * keys) + 3 * hidden * ffn + 2 * hidden
    tables = 2 if preset["untie_embeddings_and_output_weights"] else 1
    return preset["num_layers"] * layer + hidden + tables * vocabulary * hidden


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name: str) -> None:
    assert parameters(MODEL_PRESETS[name], MODEL_PRESETS[name]["vocab_size"]) == PUBLISHED[name]


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
