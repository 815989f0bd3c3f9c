"""Frozen layers keep their bits, the others train alike in every layout, even where a stage has nothing to train."""

import shutil
from pathlib import Path

import pytest
import torch

from megacpt.config.tree import Config
from megacpt.train.job import Job
from tests.jobs import NOTHING, Section, relative_difference, small_config, start, step, steps_then_save, steps_to
from tests.ranks import run_ranks

TP, PP, VP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
SHARDED = {"use_distributed_optimizer": True}
OUTER = {"bottom": 1, "top": 2}
"""Of 4 layers: at PP 2 the last stage trains only the output layer, at PP 4 the third stage trains nothing."""
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("freeze")


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[tuple[float, float]]:
    return run_ranks(steps_to, 1, small_config(folder, train=frozen(OUTER)), 2 * STEPS)[0]


def frozen(freeze: Section) -> Section:
    return {"train_iters": 10, "micro_batch_size": 2, "global_batch_size": 8, "freeze": freeze}


def weights_by_layer(job: Job) -> dict[tuple[int, str], torch.Tensor]:
    """Copies of this rank's weights, by layer number (from 1; 0 for what is outside layers) and name."""
    copies = {}
    for chunk in job.chunks:
        for layer in chunk.decoder.layers:
            for name, weight in layer.named_parameters():
                copies[layer.layer_number, name] = weight.detach().clone()
        for name, weight in chunk.named_parameters():
            if ".layers." not in name:
                copies[0, name] = weight.detach().clone()
    return copies


def changed_weights(config: Config) -> dict[tuple[int, str], bool]:
    """Which of this rank's weights differ after a few steps."""
    job = start(config)
    before = weights_by_layer(job)
    for _ in range(STEPS):
        step(job)
    return {key: not torch.equal(weight, before[key]) for key, weight in weights_by_layer(job).items()}


@pytest.mark.parametrize(
    ("world", "freeze", "layout", "optimizer"),
    [
        pytest.param(1, OUTER, {}, {}, id="one-rank"),
        pytest.param(1, {"bottom": 2, "top": 2}, {}, {}, id="all-layers"),
        pytest.param(2, OUTER, {PP: 2}, {}, id="pp2"),
        pytest.param(4, OUTER, {PP: 4}, SHARDED, id="pp4-sharded"),
        pytest.param(2, OUTER, {PP: 2, VP: 2}, {}, id="pp2-vp2"),
    ],
)
def test_only_the_others_change(folder: Path, world: int, freeze: Section, layout: Section, optimizer: Section):
    results = run_ranks(changed_weights, world, small_config(folder, layout, train=frozen(freeze), optimizer=optimizer))
    trained = range(1 + freeze["bottom"], 5 - freeze["top"])
    seen = set()
    for (number, name), changed in (item for result in results for item in result.items()):
        assert changed == (number == 0 or number in trained), (number, name)
        seen.add(number)
    assert seen == set(range(5))


@pytest.mark.parametrize(
    ("world", "layout", "optimizer"),
    [
        pytest.param(2, {PP: 2}, {}, id="pp2"),
        pytest.param(2, {TP: 2}, {}, id="tp2"),
        pytest.param(4, {PP: 4}, {}, id="pp4"),
        pytest.param(4, {PP: 4}, SHARDED, id="pp4-sharded"),
        pytest.param(2, {}, SHARDED, id="dp2-sharded"),
        pytest.param(2, {}, SHARDED | {"overlap_grad_reduce": True, "overlap_param_gather": True}, id="dp2-overlap"),
        pytest.param(4, {PP: 2}, SHARDED | {"overlap_grad_reduce": True}, id="pp2-dp2-sharded"),
    ],
)
def test_layouts_agree(
    folder: Path, reference: list[tuple[float, float]], world: int, layout: Section, optimizer: Section
):
    config = small_config(folder, layout, train=frozen(OUTER), optimizer=optimizer)
    for history in run_ranks(steps_to, world, config, STEPS):
        assert relative_difference(history, reference[:STEPS]) < 2e-6


@pytest.mark.parametrize("optimizer", [NOTHING, SHARDED], ids=["whole", "sharded"])
def test_a_run_goes_on_from_a_checkpoint(
    folder: Path, tmp_path: Path, reference: list[tuple[float, float]], optimizer: Section
):
    """Saved at PP 4, where a stage has no optimizer state at all; continued there bit for bit, and on one rank."""

    def config(layout: Section, name: str) -> Config:
        return small_config(
            folder, layout, train=frozen(OUTER), optimizer=optimizer, save={"dir": str(tmp_path / name)}
        )

    whole = run_ranks(steps_to, 4, config({PP: 4}, "whole"), 2 * STEPS)[0]
    run_ranks(steps_then_save, 4, config({PP: 4}, "cut"), STEPS)
    shutil.copytree(tmp_path / "cut", tmp_path / "moved")
    assert run_ranks(steps_to, 4, config({PP: 4}, "cut"), 2 * STEPS)[0] == whole[STEPS:]
    moved = run_ranks(steps_to, 1, config({}, "moved"), 2 * STEPS)[0]
    assert relative_difference(moved, reference[STEPS:]) < 2e-6
