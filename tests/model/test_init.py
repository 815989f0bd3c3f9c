"""Fresh weights: the same whole tensors in every layout, with Megatron's statistics."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megacpt.config.tree import Config
from tests.jobs import NEOX, NOTHING, SHAPE, VOCABULARY, Section, small_config, start
from tests.ranks import run_ranks

TP, PP, VP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
Piece = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]
STD = SHAPE["init_method_std"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("init")


def pieces_of(config: Config) -> list[Piece]:
    """This rank's shards: checkpoint key, whole shape, place in the whole, values."""
    pieces = []
    for chunk in start(config).chunks:
        sharded = chunk.sharded_state_dict()
        apply_factories(sharded)
        for shard in nested_values(sharded):
            if isinstance(shard, ShardedTensor):
                values = shard.data.detach()[(None,) * shard.prepend_axis_num]
                pieces.append((shard.key, shard.global_shape, shard.global_offset, values))
    return pieces


def whole_weights(config: Config, world: int) -> dict[str, torch.Tensor]:
    """Every tensor, layers stacked, put together from the shards of all ranks; where copies overlap they are equal."""
    whole: dict[str, torch.Tensor] = {}
    for key, shape, offset, values in (piece for pieces in run_ranks(pieces_of, world, config) for piece in pieces):
        target = whole.setdefault(key, torch.full(shape, math.nan))
        place = target[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))]
        assert torch.equal(torch.where(place.isnan(), values, place), values), key
        place.copy_(values)
    assert not any(weight.isnan().any() for weight in whole.values())
    return whole


@cache
def of_one_rank(folder: Path, *model: tuple[str, object]) -> dict[str, torch.Tensor]:
    return whole_weights(small_config(folder, dict(model)), 1)


@pytest.mark.parametrize(
    ("world", "layout", "model"),
    [
        pytest.param(2, {TP: 2}, NOTHING, id="tp2"),
        pytest.param(2, {PP: 2}, NOTHING, id="pp2"),
        pytest.param(2, {PP: 2, VP: 2}, NOTHING, id="pp2-vp2"),
        pytest.param(4, {TP: 2, PP: 2, "sequence_parallel": True}, NOTHING, id="tp2-pp2-sp"),
        pytest.param(4, {TP: 2, PP: 2}, {"untie_embeddings_and_output_weights": False}, id="tied-tp2-pp2"),
        pytest.param(2, {}, NOTHING, id="dp2"),
        pytest.param(4, {TP: 2, PP: 2, "sequence_parallel": True}, NEOX, id="neox-tp2-pp2-sp"),
    ],
)
def test_layouts_draw_the_same_bits(folder: Path, world: int, layout: Section, model: Section):
    expected = of_one_rank(folder, *model.items())
    found = whole_weights(small_config(folder, {**model, **layout}), world)
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        rows = min(len(weight), len(found[key]))
        assert torch.equal(found[key][:rows], weight[:rows]), key
        assert not found[key][rows:].any(), key


@pytest.mark.parametrize("model", [pytest.param(NOTHING, id="llama"), pytest.param(NEOX, id="neox")])
def test_statistics(folder: Path, model: Section):
    weights = of_one_rank(folder, *model.items())
    assert sum(key.endswith("bias") for key in weights) == (7 if model else 0)
    for key, weight in weights.items():
        if key.endswith("bias"):
            assert not weight.any(), key
            continue
        if "norm" in key:
            assert torch.equal(weight, torch.ones_like(weight)), key
            continue
        real = weight[:VOCABULARY] if "embedding" in key or "output" in key else weight
        std = STD / math.sqrt(2 * SHAPE["num_layers"]) if key.endswith(("linear_proj.weight", "fc2.weight")) else STD
        assert float(real.std()) == pytest.approx(std, rel=0.05), key
        assert abs(float(real.mean())) < 4 * std / math.sqrt(real.numel()), key


def test_every_tensor_and_every_layer_is_its_own_draw(folder: Path):
    drawn = {key: weight for key, weight in of_one_rank(folder).items() if "norm" not in key}
    layers = [layer for key, weight in drawn.items() if ".layers." in key for layer in weight]
    starts = [weight.flatten()[:8] for weight in [*layers, *(w for k, w in drawn.items() if ".layers." not in k)]]
    assert len({tuple(values.tolist()) for values in starts}) == len(starts)


def test_padding_rows_are_zero(folder: Path):
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        weight = of_one_rank(folder)[key]
        assert len(weight) == 512
        assert weight[:VOCABULARY].any(1).all()
        assert not weight[VOCABULARY:].any()


def test_the_seed_decides(folder: Path):
    train = {"seed": 4}
    other = whole_weights(small_config(folder, train=train), 1)
    for key, weight in of_one_rank(folder).items():
        assert torch.equal(other[key], weight) == ("norm" in key), key
