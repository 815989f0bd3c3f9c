"""Training on GPUs, against the same steps in fp32 on a CPU: `pytest -m gpu` on a machine that has some.

Every layer, kernel, recipe, attention, optimizer and overlap that a configuration can name and a CPU cannot run. What
this machine lacks (a package, a newer card, a second card) skips with its reason.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megacpt.config.tree import Config, Save
from megacpt.model.build import slot_classes
from megacpt.model.full_precision import is_quantized
from megacpt.runtime.engine import CAPABILITY, ENGINE, import_problem
from megacpt.runtime.setup import setup
from megacpt.train.build import build_job
from megacpt.train.memory import stage_state
from megacpt.train.peak import stage_peak
from megacpt.train.planning import make_plan
from tests.jobs import importing_config, main_parameters_of, parameters_of, small_config, step, train_steps
from tests.model.hf.models import make_model
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = {"hidden_size": 256, "ffn_hidden_size": 512, "num_query_groups": 2, "init_method_std": 0.05}
DOCUMENTS = {"reset_attention_mask": True, "reset_position_ids": True}
KERNELS = {"swiglu_fusion_impl": "megacpt", "rope_fusion_impl": "megacpt"}
LINEAR = {"cross_entropy_fusion_impl": "linear"}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MLP = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
TE = {"transformer_impl": ENGINE}
LOCAL = {"transformer_impl": "local"}
SHARDED = {"use_distributed_optimizer": True}
PRECISE = SHARDED | {"use_precision_aware_optimizer": True}
BF16_MOMENTS = PRECISE | {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
OFFLOADED = PRECISE | {"optimizer_cpu_offload": True}
SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
FP8 = {name: TE | {"fp8": "hybrid", "fp8_recipe": name} for name in CAPABILITY}

Section = Mapping[str, Any]
BF16, EIGHT_BITS = 2e-2, 1e-1
"""Of the losses, relative to fp32."""


def config_of(folder: Path, dtype: str, model: Section, optimizer: Section, data: Section) -> Config:
    sections = {"precision": {"dtype": dtype}, "data": {"seq_length": 64, **data}, "optimizer": optimizer}
    return small_config(folder, SHAPE | dict(model), **sections)


def on_gpu(config: Config) -> tuple[list[tuple[float, float]], dict[str, str]]:
    """Loss and gradient norm of every step on this rank's GPU, and the classes in the slots."""
    plan = make_plan(config, dist.get_world_size(), on_gpu=True)
    graphs = config.model.cuda_graph_impl != "none"
    job = build_job(plan, setup(plan.layout, config.train.seed, cuda_graphs=graphs))
    assert {parameter.device.type for chunk in job.chunks for parameter in chunk.parameters()} == {"cuda"}
    assert config.train.train_iters is not None
    return [step(job) for _ in range(config.train.train_iters)], slot_classes(job.chunks[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("on_gpu")


@cache
def on_cpu(folder: Path, documents: bool) -> Sequence[tuple[float, float]]:
    config = config_of(folder, "fp32", {}, {}, DOCUMENTS if documents else {})
    return run_ranks(train_steps, 1, config)[0]


def lacks(model: Section, world: int) -> str | None:
    """What this machine lacks for a case, in words."""
    if model["transformer_impl"] == ENGINE and (problem := import_problem(ENGINE)) is not None:
        return f"{ENGINE} does not import here: {problem}"
    if model.get("fp8") and torch.cuda.get_device_capability() < CAPABILITY[model["fp8_recipe"]]:
        return f"{torch.cuda.get_device_name()} has no kernels for {model['fp8_recipe']}"
    if model.get("attention_backend") == "flash" and import_problem("flash_attn") is not None:
        return "flash-attn does not import here"
    if model.get("gradient_accumulation_fusion") and model["transformer_impl"] == "local":
        return None if import_problem("fused_weight_gradient_mlp_cuda") is None else "apex does not import here"
    return None if torch.cuda.device_count() >= world else f"needs {world} CUDA devices"


def check(
    folder: Path,
    model: Section,
    optimizer: Section | None = None,
    *,
    data: Section | None = None,
    world: int = 1,
    dtype: str = "bf16",
    tolerance: float = BF16,
) -> dict[str, str]:
    """Losses are the CPU's at every step, and fall. Returns the slots."""
    if (lacking := lacks(model, world)) is not None:
        pytest.skip(lacking)
    config = config_of(folder, dtype, model, optimizer or {}, data or {})
    (history, slots), *_ = run_ranks(on_gpu, world, config, backend="nccl")
    expected = [loss for loss, _ in on_cpu(folder, bool(data))]
    found = [loss for loss, _ in history]
    assert found == pytest.approx(expected, rel=tolerance)
    assert found[-1] < 0.95 * found[0]
    return slots


@pytest.mark.parametrize("model", [{}, LINEAR, KERNELS, {"cross_entropy_loss_fusion": False}], ids=str)
def test_fp32_is_the_cpu_s(folder: Path, model: Section) -> None:
    check(folder, LOCAL | dict(model), dtype="fp32", tolerance=1e-4)


@pytest.mark.parametrize(
    "model",
    [{}, LINEAR, KERNELS, {"cross_entropy_fusion_impl": "native"}, MLP, FULL, {"gradient_accumulation_fusion": True}],
    ids=str,
)
@pytest.mark.parametrize("layers", [LOCAL, TE], ids=["local", "te"])
def test_bf16(folder: Path, layers: Section, model: Section) -> None:
    check(folder, layers | dict(model))


@pytest.mark.parametrize(
    "model", [LINEAR | {"gradient_accumulation_fusion": True}, {"cross_entropy_fusion_impl": "te"}], ids=str
)
def test_losses_with_the_engine(folder: Path, model: Section) -> None:
    check(folder, TE | dict(model))


@pytest.mark.parametrize("recipe", FP8)
@pytest.mark.parametrize("more", [{}, KERNELS, MLP, {"gradient_accumulation_fusion": True}], ids=str)
def test_fp8(folder: Path, recipe: str, more: Section) -> None:
    slots = check(folder, FP8[recipe] | dict(more), tolerance=EIGHT_BITS)
    assert "TELayerNormColumnParallelLinear" in slots["linear_fc1"]


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_fp8_with_outer_layers_in_bf16(folder: Path, recipe: str) -> None:
    check(folder, FP8[recipe] | {"first_last_layers_bf16": True}, tolerance=EIGHT_BITS)


def test_fp8_in_e4m3(folder: Path) -> None:
    check(folder, FP8["tensorwise"] | {"fp8": "e4m3"}, tolerance=EIGHT_BITS)


def gathering(recipe: str) -> tuple[Section, Section]:
    """Keys of a model and an optimizer that keep the FP8 layers' weights in FP8."""
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": recipe != "mxfp8"}
    return FP8[recipe] | {"fp8_param_gather": True}, SHARDED | overlap


@pytest.mark.parametrize("recipe", FP8)
@pytest.mark.parametrize("world", [1, 2])
def test_fp8_parameters(folder: Path, recipe: str, world: int) -> None:
    """Close to the CPU, and closer to the run that casts bf16 weights anew in each forward pass.

    Transformer Engine casts main parameters by way of bf16, for the same FP8 weights in both; delayed scaling takes a
    weight's maximum at another moment, after a step. What else differs is the order of sums.
    """
    model, optimizer = gathering(recipe)
    check(folder, model, optimizer, world=world, tolerance=EIGHT_BITS)
    histories = [
        run_ranks(on_gpu, world, config_of(folder, "bf16", keys, optimizer, {}), backend="nccl")[0][0]
        for keys in (model, FP8[recipe])
    ]
    kept, cast = ([loss for loss, _ in history] for history in histories)
    assert kept == pytest.approx(cast, rel=BF16 if recipe == "delayed" else 2e-3)


State = tuple[list[tuple[float, float]], dict[str, tuple[slice, torch.Tensor]], dict[str, torch.Tensor]]


def part_of_a_run(config: Config, until: int) -> State:
    """Steps up to `until` from where the run stands, a checkpoint after them; main parameters, parameters."""
    plan = make_plan(config, dist.get_world_size(), on_gpu=True)
    job = build_job(plan, setup(plan.layout, config.train.seed))
    assert any(is_quantized(parameter) for parameter in job.chunks[0].parameters())
    history = [step(job) for _ in range(job.progress.iteration, until)]
    if history:
        job.save()  # which gathers what is still owed
    mains = {name: (span, main.cpu()) for name, (span, main) in main_parameters_of(job).items()}
    return history, mains, {name: value.cpu() for name, value in parameters_of(job).items()}


@pytest.mark.parametrize("recipe", FP8)
def test_fp8_parameters_come_back_from_a_checkpoint(tmp_path: Path, recipe: str) -> None:
    """Main parameters and the FP8 weights, bit for bit; attention's backward may add in another order then."""
    model, optimizer = gathering(recipe)
    if (lacking := lacks(model, 1)) is not None:
        pytest.skip(lacking)
    whole, parts = (
        config_of(tmp_path, "bf16", model, optimizer, {}).model_copy(update={"save": Save(dir=str(tmp_path / run))})
        for run in ("whole", "parts")
    )
    ((expected, _, _),) = run_ranks(part_of_a_run, 1, whole, 6, backend="nccl")
    ((begun, mains, weights),) = run_ranks(part_of_a_run, 1, parts, 3, backend="nccl")
    ((none, mains_then, weights_then),) = run_ranks(part_of_a_run, 1, parts, 3, backend="nccl")
    assert not none
    assert all(torch.equal(main, mains_then[name][1]) for name, (_, main) in mains.items())
    assert all(torch.equal(weight, weights_then[name]) for name, weight in weights.items())
    ((rest, _, _),) = run_ranks(part_of_a_run, 1, parts, 6, backend="nccl")
    found = [loss for loss, _ in begun + rest]
    assert found == pytest.approx([loss for loss, _ in expected], rel=2e-3)


def values_on_gpu(config: Config) -> dict[str, torch.Tensor]:
    plan = make_plan(config, 1, on_gpu=True)
    job = build_job(plan, setup(plan.layout, config.train.seed))
    return {name: value.cpu() for name, value in parameters_of(job).items()}


@pytest.mark.parametrize("recipe", FP8)
def test_an_import_into_fp8_parameters_keeps_main_parameters(tmp_path: Path, recipe: str) -> None:
    """The gate passes as well, on the weights as they were before FP8."""
    model, optimizer = gathering(recipe)
    if (lacking := lacks(model, 1)) is not None:
        pytest.skip(lacking)
    source = make_model(
        tmp_path / "model",
        "tinyllama",
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        initializer_range=0.05,
    )
    sections: dict[str, Section] = {"data": {"seq_length": 64}, "optimizer": optimizer}
    kept = importing_config(tmp_path, source, 640, model, precision={"dtype": "bf16"}, **sections)
    exact = importing_config(tmp_path, source, 640, TE, precision={"dtype": "fp32"}, **sections)
    ((_, mains, _),) = run_ranks(part_of_a_run, 1, kept, 0, backend="nccl")
    (values,) = run_ranks(values_on_gpu, 1, exact, backend="nccl")
    assert mains.keys() == values.keys()
    assert all(torch.equal(main, values[name].flatten()[span]) for name, (span, main) in mains.items())


@pytest.mark.parametrize("data", [{}, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("backend", ["auto", "flash", "fused", "unfused"])
def test_attention(folder: Path, backend: str, data: Section) -> None:
    check(folder, TE | {"attention_backend": backend}, data=data)


@pytest.mark.parametrize("layers", [LOCAL, TE, FP8["tensorwise"]], ids=["local", "te", "fp8"])
def test_documents_and_our_rotation(folder: Path, layers: Section) -> None:
    check(folder, layers | KERNELS, data=DOCUMENTS, tolerance=EIGHT_BITS if "fp8" in layers else BF16)


@pytest.mark.parametrize("layers", [LOCAL, TE, FP8["tensorwise"]], ids=["local", "te", "fp8"])
def test_cuda_graphs(folder: Path, layers: Section) -> None:
    graphs = layers | {"cuda_graph_impl": "local"}
    check(folder, graphs, tolerance=EIGHT_BITS if "fp8" in layers else BF16)


@pytest.mark.parametrize("optimizer", [SHARDED, PRECISE, BF16_MOMENTS, OFFLOADED], ids=str)
def test_optimizers(folder: Path, optimizer: Section) -> None:
    check(folder, TE, optimizer)


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        pytest.param(SP, {}, id="tp2-sp"),
        pytest.param(SP | LINEAR | KERNELS, {}, id="tp2-sp-ours"),
        pytest.param(SP | {"tp_comm_overlap": True}, {}, id="tp2-sp-userbuffers"),
        pytest.param({"pipeline_model_parallel_size": 2}, {}, id="pp2"),
        pytest.param(
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, {}, id="pp2-interleaved"
        ),
        pytest.param({"context_parallel_size": 2}, {}, id="cp2"),
        pytest.param({"context_parallel_size": 2, "cp_comm_type": "a2a"}, {}, id="cp2-a2a"),
        pytest.param({"context_parallel_size": 2, "cp_comm_type": "all_gather"}, {}, id="cp2-all-gather"),
        pytest.param(LOCAL | {"context_parallel_size": 2}, {}, id="cp2-local"),
        pytest.param({}, SHARDED | {"overlap_grad_reduce": True, "overlap_param_gather": True}, id="dp2-overlap"),
    ],
)
def test_two_gpus(folder: Path, model: Section, optimizer: Section) -> None:
    check(folder, TE | dict(model), optimizer, world=2)


def peak(config: Config) -> tuple[int, int]:
    """Bytes that the memory table tells, and the most that torch had allocated in a step after the first."""
    plan = make_plan(config, 1, on_gpu=True)
    job = build_job(plan, setup(plan.layout, config.train.seed))
    step(job)
    torch.cuda.reset_peak_memory_stats()
    step(job)
    told = stage_state(plan.setting, 0).total + stage_peak(plan.setting, 0).total
    return told, torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("model", [{}, LINEAR, MLP, FULL, KERNELS], ids=str)
@pytest.mark.parametrize("layers", [LOCAL, TE, FP8["tensorwise"]], ids=["local", "te", "fp8"])
def test_the_memory_table_is_the_peak(tmp_path: Path, layers: Section, model: Section) -> None:
    """Large enough that what cuBLAS keeps for itself is small beside it."""
    if (lacking := lacks(layers, 1)) is not None:
        pytest.skip(lacking)
    shape = {"num_layers": 8, "hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 16}
    shape |= {"num_query_groups": 4, "vocab_size": 32_000, "max_position_embeddings": 2048}
    sections: dict[str, Section] = {"data": {"seq_length": 2048}, "precision": {"dtype": "bf16"}}
    sections["train"] = {"global_batch_size": 4}
    ((told, measured),) = run_ranks(
        peak, 1, small_config(tmp_path, shape | dict(layers) | dict(model), **sections), backend="nccl"
    )
    assert told == pytest.approx(measured, rel=0.05)
