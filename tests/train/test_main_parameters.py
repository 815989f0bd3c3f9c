"""fp32 main parameters begin with the weights that were drawn, imported or loaded, not with their bf16 rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megacpt.config.tree import Config
from tests.jobs import Section, importing_config, main_parameters_of, parameters_of, small_config, start, step
from tests.model.hf.models import make_model
from tests.ranks import run_ranks

BF16, FP32 = ({"precision": {"dtype": dtype}} for dtype in ("bf16", "fp32"))
SHARDED = {"use_distributed_optimizer": True}
LAYOUTS = [
    pytest.param(1, {}, {}, id="whole"),
    pytest.param(2, {}, SHARDED, id="dp2-sharded"),
    pytest.param(2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, SHARDED, id="tp2-sp-sharded"),
    pytest.param(
        2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, {}, id="pp2-interleaved"
    ),
]

Mains = dict[str, tuple[slice, torch.Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("main_parameters")
    make_model(folder / "fp32", "tied")
    make_model(folder / "bf16", "tinyllama", torch.bfloat16)
    return folder


def at_start(config: Config) -> tuple[dict[str, torch.Tensor], Mains]:
    job = start(config)
    return parameters_of(job), main_parameters_of(job)


def after_a_step(config: Config) -> tuple[dict[str, torch.Tensor], Mains]:
    """Of a checkpoint."""
    job = start(config)
    step(job)
    job.save()
    return parameters_of(job), main_parameters_of(job)


def differ(mains: Mains, weights: dict[str, torch.Tensor]) -> bool:
    assert mains
    return any(not torch.equal(main, weights[name].flatten()[span]) for name, (span, main) in mains.items())


@pytest.mark.parametrize(("world", "layout", "optimizer"), LAYOUTS)
@pytest.mark.parametrize("source", ["drawn", "imported"])
def test_they_are_the_source_s(folder: Path, source: str, world: int, layout: Section, optimizer: Section) -> None:
    def config(dtype: dict[str, Any]) -> Config:
        if source == "drawn":
            return small_config(folder, layout, **dtype, optimizer=optimizer)
        return importing_config(folder, folder / "fp32", 1003, layout, **dtype, optimizer=optimizer)

    exact, found = (run_ranks(at_start, world, config(dtype)) for dtype in (FP32, BF16))
    for (values, _), (weights, mains) in zip(exact, found, strict=True):
        assert all(torch.equal(weights[name], values[name].bfloat16().float()) for name in values)
        assert not differ(mains, values)
        assert differ(mains, weights)
    assert {name for _, mains in found for name in mains} == {name for weights, _ in found for name in weights}


@pytest.mark.parametrize("optimizer", [{}, SHARDED], ids=["whole", "sharded"])
def test_a_bf16_source_is_exact(folder: Path, optimizer: Section) -> None:
    config = importing_config(folder, folder / "bf16", 640, **BF16, optimizer=optimizer)
    for weights, mains in run_ranks(at_start, 2, config):
        assert not differ(mains, weights)


@pytest.mark.parametrize("optimizer", [{}, SHARDED], ids=["whole", "sharded"])
def test_a_checkpoint_s_are_taken_over(folder: Path, optimizer: Section) -> None:
    run = {"save": {"dir": str(folder / f"first_{len(optimizer)}")}, "optimizer": optimizer}
    ((weights, mains),) = run_ranks(after_a_step, 1, small_config(folder, **BF16, **run))
    onwards = {"init": {"checkpoint": run["save"]["dir"]}, "save": {"dir": str(folder / "onwards")}}
    found = run_ranks(at_start, 2, small_config(folder, **BF16, **onwards, optimizer=SHARDED))
    whole = {name: main for name, (_, main) in mains.items()}
    assert differ(mains, weights)
    for then, mains_then in found:
        assert all(torch.equal(then[name], weights[name]) for name in weights)
        assert not differ(mains_then, whole)


def test_a_checkpoint_in_fp32_is_taken_over(folder: Path) -> None:
    run = {"save": {"dir": str(folder / "run_fp32")}}
    ((weights, _),) = run_ranks(after_a_step, 1, small_config(folder, **FP32, **run))
    onwards = {"init": {"checkpoint": run["save"]["dir"]}, "save": {"dir": str(folder / "onwards")}}
    ((then, mains),) = run_ranks(at_start, 1, small_config(folder, **BF16, **onwards))
    assert all(torch.equal(then[name], weights[name].bfloat16().float()) for name in weights)
    assert not differ(mains, weights)


def test_an_imported_vocabulary_is_padded_with_zeros(folder: Path) -> None:
    ((_, mains),) = run_ranks(at_start, 1, importing_config(folder, folder / "fp32", 1003, **BF16))
    _, table = mains["0.embedding.word_embeddings.weight"]
    assert table.shape == (1024 * 48,)
    assert not table[1003 * 48 :].any()
