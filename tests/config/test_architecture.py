"""A model's shape from a preset and overrides."""

import pytest

from megacpt.config.architecture import resolve_architecture
from megacpt.config.tree import Model
from megacpt.errors import UserError


def test_channels_per_head_follow_from_width_and_heads() -> None:
    shape = {"num_layers": 2, "ffn_hidden_size": 64, "rotary_base": 1e4, "norm_epsilon": 1e-5}
    rest = {"untie_embeddings_and_output_weights": True, "max_position_embeddings": 64, "vocab_size": 100}
    found = resolve_architecture(Model(**shape, **rest, hidden_size=32, num_attention_heads=4), None)
    assert (found.kv_channels, found.num_query_groups) == (8, 4)
    assert resolve_architecture(Model(**shape, **rest, hidden_size=34, num_attention_heads=4, kv_channels=6), None)
    for width in (2, 34):
        with pytest.raises(UserError, match=rf"hidden_size {width} .*num_attention_heads 4.*kv_channels"):
            resolve_architecture(Model(**shape, **rest, hidden_size=width, num_attention_heads=4), None)


def test_a_head_is_as_wide_as_the_overridden_shape_says() -> None:
    assert resolve_architecture(Model(preset="tiny", hidden_size=96), 100).kv_channels == 16
    assert resolve_architecture(Model(preset="tiny", kv_channels=20, hidden_size=96), 100).kv_channels == 20
