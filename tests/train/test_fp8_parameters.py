"""`model.fp8_param_gather` on a CPU: megatron-core's buffers, gather and optimizer over a stand-in for its FP8 class.

What Transformer Engine does with such parameters, its kernels and casts, is for GPUs: `tests/train/test_on_gpu.py`.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megacpt.config.tree import Config
from megacpt.train.memory import gathered_bytes, stage_state
from megacpt.train.optimizer import distributed_parts
from tests.jobs import (
    Section,
    importing_config,
    main_parameters_of,
    parameters_of,
    relative_difference,
    small_config,
    step,
)
from tests.jobs import start as start_plain
from tests.model.hf.models import make_model, tensors_of
from tests.quantized import Quantized, quantized_of, start
from tests.ranks import run_ranks

SETTINGS: dict[str, Any] = {
    "precision": {"dtype": "bf16"},
    "optimizer": {"lr": 3e-3, "adam_eps": 1e-5, "use_distributed_optimizer": True},
}
UNCLIPPED = SETTINGS | {"optimizer": SETTINGS["optimizer"] | {"clip_grad": 0.0}}
FP32 = {"precision": {"dtype": "fp32"}}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
LAYOUTS = [
    pytest.param(1, {}, id="one rank"),
    pytest.param(2, {}, id="dp2"),
    pytest.param(2, TP2, id="tp2-sp"),
    pytest.param(2, PP2, id="pp2-interleaved"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8_parameters")
    make_model(folder / "fp32", "tied")
    make_model(folder / "bf16", "tinyllama", torch.bfloat16)
    return folder


def config_of(folder: Path, source: str, layout: Section, **sections: Section) -> Config:
    if source == "drawn":
        return small_config(folder, layout, **sections)
    return importing_config(folder, folder / source, {"fp32": 1003, "bf16": 640}[source], layout, **sections)


def values_of(config: Config) -> dict[str, torch.Tensor]:
    return parameters_of(start_plain(config))


def at_start(config: Config) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    job = start(config, gathers=True)
    return main_parameters_of(job), quantized_of(job)


@pytest.mark.parametrize(
    ("source", "world", "layout"),
    [
        *(
            pytest.param(source, *case.values, id=f"{source}-{case.id}")
            for source in ("drawn", "fp32")
            for case in LAYOUTS
        ),
        pytest.param("bf16", 2, {}, id="bf16-dp2"),  # its values are fp32's that end early: one layout is enough
    ],
)
def test_main_parameters_are_the_source_s(folder: Path, source: str, world: int, layout: Section) -> None:
    """An import passes the gate as well, which compares it with transformers."""
    exact = run_ranks(values_of, world, config_of(folder, source, layout, **FP32))
    found = run_ranks(at_start, world, config_of(folder, source, layout, **SETTINGS))
    for values, (mains, quantized) in zip(exact, found, strict=True):
        assert len(quantized) == 4 * 4 // (2 if layout is PP2 else 1)
        for name, weight in quantized.items():
            assert torch.equal(weight, Quantized.of(values[name].bfloat16()).dequantize())
            assert not torch.equal(weight.float(), values[name])
        assert mains
        for name, (span, main) in mains.items():
            assert torch.equal(main, values[name].flatten()[span]), name
    assert {name for mains, _ in found for name in mains} == {name for values in exact for name in values}


def steps(
    config: Config, gathers: bool, until: int, recipe: str = "tensorwise", *, save: bool = False
) -> tuple[list[Any], dict[str, Any]]:
    job = start(config, gathers=gathers, recipe=recipe)
    for wrapped in job.wrapped if gathers else ():
        assert wrapped.ddp_config.fp8_param_gather
        shared = {buffer.param_data.data_ptr() == buffer.grad_data.data_ptr() for buffer in wrapped.buffers}
        assert shared == ({False, True} if recipe == "mxfp8" else {False})
        kept = [p for p in wrapped.parameters() if isinstance(p, Quantized)]
        assert not any("high_precision" in name for p in kept for name in vars(p)), "what was drawn at first is gone"
        assert all(p.tensor_model_parallel for p in kept), "and what is attached has stayed"  # type: ignore[attr-defined]
    for part in distributed_parts(job.optimizer) if gathers else ():
        assert part.config.fp8_recipe == recipe
    history = [step(job) for _ in range(job.progress.iteration, until)]
    if save:
        job.save()
    mains = main_parameters_of(job)
    if dist.get_world_size() == 1:
        for name, weight in quantized_of(job).items():
            assert torch.equal(weight, Quantized.of(mains[name][1].bfloat16().view(weight.shape)).dequantize())
    return history, mains


@cache
def cast_steps(folder: Path, world: int, *layout: tuple[str, Any]) -> list[Any]:
    """Without FP8 parameters; what recipes make of a weight is the stand-in's doing, and so the same."""
    return run_ranks(steps, world, small_config(folder, dict(layout), **UNCLIPPED), False, 5)


@pytest.mark.parametrize("recipe", ["tensorwise", "mxfp8"])
@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_steps_are_those_of_weights_cast_in_every_forward_pass(
    folder: Path, world: int, layout: Section, recipe: str
) -> None:
    """Bit for bit: what is gathered in FP8 is what each rank would make of the weights gathered in bf16.

    Without clipping: the norm is summed in the order of the buffers, of which FP8 parameters have their own.
    """
    cast = cast_steps(folder, world, *layout.items())
    gathered = run_ranks(steps, world, small_config(folder, layout, **UNCLIPPED), True, 5, recipe)
    losses = [[[loss for loss, _ in history] for history, _ in ranks] for ranks in (gathered, cast)]
    assert losses[0] == losses[1]
    assert relative_difference(gathered[0][0], cast[0][0]) < 1e-6
    assert cast[0][0][-1][0] < cast[0][0][0][0]


def steps_then_save(config: Config, gathers: bool, until: int, recipe: str) -> tuple[list[Any], dict[str, Any]]:
    return steps(config, gathers, until, recipe, save=True)


@pytest.mark.parametrize("recipe", ["tensorwise", "mxfp8"])
def test_a_checkpoint_goes_on_exactly_and_holds_no_rounded_weights(folder: Path, recipe: str) -> None:
    place = {"checkpoint": str(folder / recipe)}
    config = small_config(folder, **SETTINGS, save={"dir": str(folder / recipe)})
    whole = run_ranks(steps, 2, config, True, 5, recipe)
    begun = run_ranks(steps_then_save, 2, config, True, 3, recipe)
    rest = run_ranks(steps, 2, config, True, 5, recipe)
    assert [b + r for (b, _), (r, _) in zip(begun, rest, strict=True)] == [history for history, _ in whole]
    # Without FP8 parameters it goes on just as well.
    cast = run_ranks(steps, 2, config, False, 5)
    assert relative_difference(cast[0][0], rest[0][0]) < 1e-5

    mains: dict[str, list[torch.Tensor]] = {}
    for _, of_rank in begun:
        for name, (_, main) in of_rank.items():
            mains.setdefault(name, []).append(main)
    wanted = {name: torch.cat(shards) for name, shards in mains.items()}
    ((taken, _),) = run_ranks(at_start, 1, small_config(folder, **SETTINGS, init=place))
    assert all(torch.equal(main, wanted[name]) for name, (_, main) in taken.items())
    (weights,) = run_ranks(values_of, 1, small_config(folder, **SETTINGS, init=place))
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name].flatten(), wanted[name].bfloat16().float()) for name in wanted)


def export(config: Config) -> dict[str, Any]:
    job = start(config, gathers=True)
    step(job)
    job.save()
    return main_parameters_of(job)


def test_an_export_holds_main_parameters_in_bf16(folder: Path) -> None:
    save = {
        "save": {"dir": str(folder / "exporting"), "hf_every": 1},
        "train": {"global_batch_size": 8, "train_iters": 1},
    }
    (mains,) = run_ranks(export, 1, config_of(folder, "bf16", {}, **SETTINGS, **save))
    exported = tensors_of(folder / "exporting" / "hf" / "iter_0000001")
    _, down = mains["0.decoder.layers.2.mlp.linear_fc2.weight"]
    found = exported["model.layers.2.mlp.down_proj.weight"]
    assert torch.equal(found.flatten(), down.bfloat16())


def memory(config: Config) -> dict[str, tuple[int, int]]:
    """Bytes that the table tells, and those of the buffers and transposes."""
    job = start(config, gathers=True)
    told, setting = stage_state(job.plan.setting, 0), job.plan.setting
    buffers = [buffer for wrapped in job.wrapped for buffer in wrapped.buffers]
    transposes = sum(weight.numel() for weight in quantized_of(job).values())
    parameters = [p for chunk in job.chunks for p in chunk.parameters()]
    received = sum(p.numel() * (1 if isinstance(p, Quantized) else 2) for p in parameters)
    ranks = setting.layout.data
    return {
        "weights": (told.weights, sum(buffer.param_data.nbytes for buffer in buffers) + transposes),
        "gradients": (told.gradients, sum(buffer.grad_data.nbytes for buffer in buffers)),
        "parameters": (told.parameters, sum(p.numel() for p in parameters)),
        "gathered": (gathered_bytes(setting, 0, fp8=True), received * (ranks - 1) // ranks),
    }


@pytest.mark.parametrize("layout", [{}, TP2], ids=["dp2", "tp2-sp"])
def test_the_memory_table_is_what_the_buffers_hold(folder: Path, layout: Section) -> None:
    for found in run_ranks(memory, 2, small_config(folder, layout, **SETTINGS)):
        for told, held in found.values():
            assert told == held
