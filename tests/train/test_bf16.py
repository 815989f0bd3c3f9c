"""bf16 parameters with fp32 main parameters, fp32 moments and fp32 gradient reduction."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megacpt.config.tree import Config
from tests.jobs import Section, relative_difference, small_config, start, step, steps_to
from tests.ranks import run_ranks

BF16 = {"dtype": "bf16", "grad_reduce_in_fp32": True}
SHARDED = {"use_distributed_optimizer": True}
STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bf16")


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[tuple[float, float]]:
    return run_ranks(steps_to, 1, small_config(folder, precision=BF16), STEPS)[0]


def dtypes_of(config: Config) -> dict[str, set[torch.dtype]]:
    """The types of everything that a step touches, after one."""
    job = start(config)
    step(job)
    found: dict[str, Any] = {
        "parameters": {weight.dtype for chunk in job.chunks for weight in chunk.parameters()},
        "gradient buffers": {buffer.grad_dtype for wrapped in job.wrapped for buffer in wrapped.buffers},
        "main parameters": set(),
        "moments": set(),
    }
    for part in getattr(job.optimizer, "chained_optimizers", [job.optimizer]):
        assert isinstance(part, DistributedOptimizer) == config.optimizer.use_distributed_optimizer
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                found["main parameters"].add(main.dtype)
                found["moments"] |= {part.optimizer.state[main][name].dtype for name in ("exp_avg", "exp_avg_sq")}
    return found


@pytest.mark.parametrize("reduce_in_fp32", [True, False])
@pytest.mark.parametrize("optimizer", [{}, SHARDED], ids=["whole", "sharded"])
def test_dtypes(folder: Path, optimizer: Section, reduce_in_fp32: bool):
    precision = BF16 | {"grad_reduce_in_fp32": reduce_in_fp32}
    for found in run_ranks(dtypes_of, 2, small_config(folder, precision=precision, optimizer=optimizer)):
        assert found == {
            "parameters": {torch.bfloat16},
            "gradient buffers": {torch.float32 if reduce_in_fp32 else torch.bfloat16},
            "main parameters": {torch.float32},
            "moments": {torch.float32},
        }


def test_it_learns_as_fp32_does(folder: Path, reference: list[tuple[float, float]]):
    fp32 = run_ranks(steps_to, 1, small_config(folder), STEPS)[0]
    assert reference[-1][0] < reference[0][0] - 0.05
    assert 0 < relative_difference(*_column(0, reference, fp32)) < 5e-3


def rounding_of(config: Config) -> tuple[bool, bool]:
    """After a few steps: are parameters the rounded main parameters, and do these hold more than bf16 can?"""
    job = start(config)
    for _ in range(3):
        step(job)
    (part,) = getattr(job.optimizer, "chained_optimizers", [job.optimizer])
    mains = [main for group in part.fp32_from_float16_groups for main in group]
    models = [model for group in part.float16_groups for model in group]
    rounded = [main.bfloat16() for main in mains]
    same = all(torch.equal(r, model) for r, model in zip(rounded, models, strict=True))
    return same, any(not torch.equal(r.float(), main) for r, main in zip(rounded, mains, strict=True))


def test_main_parameters_keep_what_bf16_loses(folder: Path):
    assert run_ranks(rounding_of, 1, small_config(folder, precision=BF16)) == [(True, True)]


@pytest.mark.parametrize(
    ("world", "layout", "optimizer"),
    [
        pytest.param(2, {}, {}, id="dp2"),
        pytest.param(2, {}, SHARDED, id="dp2-sharded"),
        pytest.param(2, {}, SHARDED | {"overlap_grad_reduce": True, "overlap_param_gather": True}, id="dp2-overlap"),
        pytest.param(2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {}, id="tp2-sp"),
        pytest.param(2, {"pipeline_model_parallel_size": 2}, {}, id="pp2"),
    ],
)
def test_layouts_agree_closely(
    folder: Path, reference: list[tuple[float, float]], world: int, layout: Section, optimizer: Section
):
    config = small_config(folder, layout, precision=BF16, optimizer=optimizer)
    for history in run_ranks(steps_to, world, config, STEPS):
        losses, norms = (relative_difference(*_column(number, history, reference)) for number in (0, 1))
        assert losses < 1e-3
        assert norms < 1e-2


def _column(number: int, *histories: list[tuple[float, float]]) -> list[list[list[float]]]:
    return [[[step[number]] for step in history] for history in histories]
