"""Every layout of ranks takes the same steps: losses and gradient norms over 10 steps, from one seed, in fp32."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import NEOX, NOTHING, Section, relative_difference, small_config, train_steps
from tests.ranks import run_ranks

TP, PP, VP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
CP = "context_parallel_size"
SP = {TP: 2, "sequence_parallel": True}
ATTENTION_AGAIN = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
SHARDED = {"use_distributed_optimizer": True}
OVERLAPPED = SHARDED | {"overlap_grad_reduce": True, "overlap_param_gather": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
TOLERANCE = 2e-6
SMALL = {"micro_batch_size": 2}
"""Four micro-batches: four pipeline stages and interleaved ones are full with them, and four replicas have one each."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@cache
def reference(folder: Path, *model: tuple[str, Any], small: bool = False) -> list[tuple[float, float]]:
    """What one rank does with a model, in micro-batches of the same size."""
    return run_ranks(train_steps, 1, small_config(folder, dict(model), train=SMALL if small else NOTHING))[0]


def check(folder: Path, world: int, model: Section, layout: Section, optimizer: Section = NOTHING) -> None:
    """Every rank reports what one rank alone computes."""
    replicas = world // (layout.get(TP, 1) * layout.get(PP, 1) * layout.get(CP, 1))
    small = layout.get(PP) == 4 or VP in layout or layout == {PP: 2} or replicas == 4
    expected, train = reference(folder, *model.items(), small=small), SMALL if small else NOTHING
    results = run_ranks(train_steps, world, small_config(folder, {**model, **layout}, optimizer=optimizer, train=train))
    assert max(relative_difference(found, expected) for found in results) < TOLERANCE


def test_the_reference_learns_and_clips(folder: Path):
    losses, norms = zip(*reference(folder), strict=True)
    assert losses[-1] < losses[0] - 0.1
    assert min(norms) > 0.5  # clip_grad, so that clipping takes part in every comparison


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(2, {TP: 2}, id="tp2"),
        pytest.param(2, SP, id="tp2-sp"),
        pytest.param(2, {PP: 2}, id="pp2"),
        pytest.param(2, {PP: 2, VP: 2}, id="pp2-vp2"),
        pytest.param(4, {PP: 4}, id="pp4"),
        pytest.param(4, {PP: 2, **SP}, id="tp2-pp2-sp"),
        pytest.param(4, {TP: 4}, id="tp4-of-2-query-groups"),
        pytest.param(1, FULL, id="recompute-full"),
        pytest.param(1, {"recompute_granularity": "selective"}, id="recompute-selective"),
        pytest.param(4, {PP: 2, **SP, **FULL}, id="tp2-pp2-sp-recompute"),
    ],
)
def test_model_parallel(folder: Path, world: int, layout: Section):
    check(folder, world, {}, layout)


@pytest.mark.parametrize(
    ("world", "layout", "optimizer"),
    [
        pytest.param(2, {}, {}, id="dp2"),
        pytest.param(2, {}, {"overlap_grad_reduce": True}, id="dp2-overlap"),
        pytest.param(2, {}, SHARDED, id="dp2-sharded"),
        pytest.param(2, {}, OVERLAPPED, id="dp2-sharded-overlap"),
        pytest.param(4, {}, SHARDED, id="dp4-sharded"),
        pytest.param(4, SP, SHARDED, id="tp2-sp-dp2-sharded"),
        pytest.param(4, {PP: 2}, OVERLAPPED, id="pp2-dp2-sharded-overlap"),
        pytest.param(4, {PP: 2, VP: 2}, OVERLAPPED, id="pp2-vp2-dp2-sharded-overlap"),
    ],
)
def test_data_parallel(folder: Path, world: int, layout: Section, optimizer: Section):
    check(folder, world, {}, layout, optimizer)


@pytest.mark.parametrize(
    ("world", "layout", "optimizer"),
    [
        pytest.param(2, {CP: 2}, {}, id="cp2"),
        pytest.param(4, {CP: 4, "cp_comm_type": "all_gather"}, SHARDED, id="cp4-sharded"),
        pytest.param(4, {CP: 2}, OVERLAPPED, id="cp2-dp2-sharded-overlap"),
        pytest.param(4, {CP: 2, **SP, **ATTENTION_AGAIN}, {}, id="cp2-tp2-sp-attention-recomputed"),
        pytest.param(4, {CP: 2, PP: 2, VP: 2, **FULL}, {}, id="cp2-pp2-vp2-recompute"),
    ],
)
def test_context_parallel(folder: Path, world: int, layout: Section, optimizer: Section):
    check(folder, world, {}, layout, optimizer)


def test_context_parallel_with_tied_embeddings_and_the_loss_of_hidden_states(folder: Path):
    model = {"vocab_size": 1000, "untie_embeddings_and_output_weights": False}
    check(folder, 4, model, {CP: 2, PP: 2, "cross_entropy_fusion_impl": "linear"})


def test_context_parallel_with_megatron_core_s_rotation_of_some_channels(folder: Path):
    check(folder, 2, NEOX, {CP: 2, "rope_fusion_impl": "native"})


@pytest.mark.parametrize("layout", [{PP: 4, VP: 2}, {PP: 2, VP: 4}], ids=["pp4-vp2", "pp2-vp4"])
def test_interleaved_pipelines_of_eight_layers(folder: Path, layout: Section):
    check(folder, layout[PP], {"num_layers": 8}, layout)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(2, {PP: 2}, id="pp2"),
        pytest.param(2, {PP: 2, VP: 2}, id="pp2-vp2"),
        pytest.param(4, {PP: 2, **SP}, id="tp2-pp2-sp"),
    ],
)
def test_tied_embeddings(folder: Path, world: int, layout: Section):
    check(folder, world, {"untie_embeddings_and_output_weights": False}, layout)


def test_vocabulary_of_1000(folder: Path):
    """1,024 rows at TP 1 and at TP 2, where all of the padding is the second rank's."""
    check(folder, 2, {"vocab_size": 1000}, {TP: 2})


def test_vocabulary_padded_differently(folder: Path):
    """1,024 rows at TP 1, 1,152 at TP 3, in embeddings that are also the output layer."""
    heads = {"num_attention_heads": 6, "num_query_groups": 3, "kv_channels": 8}
    check(folder, 3, {"vocab_size": 1003, "untie_embeddings_and_output_weights": False, **heads}, {TP: 3})


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(1, {}, id="one"),
        pytest.param(2, {TP: 2}, id="tp2"),
        pytest.param(2, SP, id="tp2-sp"),
        pytest.param(4, {PP: 2, **SP}, id="tp2-pp2-sp"),
    ],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_loss_of_hidden_states(folder: Path, world: int, layout: Section, tied: bool):
    """Without whole logits the steps are those of the loss over logits; padding is the second rank's."""
    model = {"vocab_size": 1000, "untie_embeddings_and_output_weights": not tied}
    check(folder, world, model, {**layout, "cross_entropy_fusion_impl": "linear"})


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(1, {}, id="one"),
        pytest.param(4, {PP: 2, **SP}, id="tp2-pp2-sp"),
        pytest.param(1, {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, id="selective"),
        pytest.param(1, FULL, id="full"),
    ],
)
def test_our_kernels_in_the_layers(folder: Path, world: int, layout: Section):
    check(folder, world, {}, {**layout, "swiglu_fusion_impl": "megacpt", "rope_fusion_impl": "megacpt"})


def test_our_rotation_of_some_channels(folder: Path):
    check(folder, 2, NEOX, {TP: 2, "rope_fusion_impl": "megacpt"})


def test_the_loss_is_megatron_cores(folder: Path):
    check(folder, 2, {"vocab_size": 1000}, {TP: 2, "cross_entropy_loss_fusion": False})
