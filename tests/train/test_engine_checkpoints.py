"""Checkpoints between local layers and Transformer Engine's, and between optimizers that keep their state differently.

Needs the package, and no GPU: modules are built, filled, saved and loaded, not run.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megacpt.config.tree import Config
from megacpt.model.build import BuildOptions, build_chunks, transformer_config
from megacpt.model.full_precision import Originals
from megacpt.model.gpt import LanguageModel
from megacpt.model.init import draw_weights
from megacpt.model.spec import CHECKPOINT_NAMES
from megacpt.runtime.engine import ENGINE, import_problem
from megacpt.runtime.setup import Layout, setup
from megacpt.train import checkpoint
from megacpt.train.checkpoint import load_all, load_weights, save_weights
from megacpt.train.main_parameters import set_main_parameters
from megacpt.train.optimizer import distributed_parts, own_shards
from megacpt.train.planning import make_plan
from tests.jobs import small_config
from tests.ranks import run_ranks

PROBLEM = import_problem(ENGINE)
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=f"{ENGINE} does not import here: {PROBLEM}")
PRECISE = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}


def config_in(folder: Path, **keys: Any) -> Config:
    shape = {"hidden_size": 64, "ffn_hidden_size": 96} | keys
    return small_config(folder, shape, precision={"dtype": "bf16"}, optimizer={"use_distributed_optimizer": True})


def build(config: Config, *, engine: bool) -> list[LanguageModel]:
    """A model of either kind on a CPU that passes for a GPU host while it is built."""
    plan = make_plan(config, 1, on_gpu=True)
    is_available = torch.cuda.is_available
    torch.cuda.is_available = lambda: engine
    options = BuildOptions(torch.bfloat16, restart_positions=False, engine=engine)
    made = transformer_config(plan.architecture, config.model, options)
    made.use_cpu_initialization = True
    chunks = build_chunks(plan.architecture, config.model, made, options)
    torch.cuda.is_available = is_available
    return chunks


def weights(chunks: list[LanguageModel]) -> dict[str, torch.Tensor]:
    """Parameters by the engine's names."""
    found = {}
    for name, tensor in chunks[0].named_parameters():
        for local, engine in CHECKPOINT_NAMES.items():
            name = name.replace(local, engine)
        found[name] = tensor.detach().clone()
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def exchange(folder: Path) -> None:
    setup(Layout(1), 1, threads=1)
    config = config_in(folder)
    architecture = make_plan(config, 1, on_gpu=False).architecture
    for first in (False, True):
        source, target = build(config, engine=first), build(config, engine=not first)
        draw_weights(source, architecture, 3, 0.1)
        saved = save_weights(folder / f"of_{first}", source, lambda where: None)
        load_weights(saved, target)
        assert same(weights(source), weights(target))
        draw_weights(target, architecture, 3, 0.1)
        assert same(weights(source), weights(target)), "the same seed draws the same weights"


def test_weights_move_between_local_layers_and_the_engine(tmp_path: Path) -> None:
    run_ranks(exchange, 1, tmp_path)


def take_its_optimizer() -> None:
    """What megatron-core had before its CUDA became the CPU; no step is done with it."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer
    from transformer_engine.pytorch.optimizers import FusedAdam

    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True


def optimizer_of(config: Config, chunks: list[LanguageModel]) -> Any:
    from megacpt.train.optimizer import build_optimizer, wrap_chunks

    take_its_optimizer()
    return build_optimizer(wrap_chunks(chunks, config.optimizer, config.precision), config.optimizer, torch.bfloat16)


def states(optimizer: Any) -> list[torch.Tensor]:
    """Moments and main parameters, in fp32, in the order of the gradient buffer."""
    (part,) = distributed_parts(optimizer)
    found = []
    for parameter in part.model_param_group_index_map:
        tensors = part._get_main_param_and_optimizer_states(parameter)
        found += [tensors[name].detach().float().clone() for name in ("param", "exp_avg", "exp_avg_sq")]
    return found


def save(target: Path, chunks: list[LanguageModel], optimizer: Any) -> Path:
    """Weights and optimizer state, without what a run notes beside them."""
    from megatron.core import dist_checkpointing

    target.mkdir()
    saved = checkpoint._model_state(chunks)
    saved["optimizer"] = checkpoint._optimizer_state(optimizer, chunks, loading=False)
    dist_checkpointing.save(saved, str(target), content_metadata=dict(checkpoint.CONTENT))
    return target


def move_state(folder: Path) -> None:
    """Plain, precise, plain: what bf16 moments can hold arrives, main parameters arrive to the last bit."""
    setup(Layout(1), 1, threads=1)
    plain = config_in(folder)
    precise = plain.model_copy(update={"optimizer": plain.optimizer.model_copy(update=PRECISE)})
    kinds = [plain, precise, plain]
    chunks = build(plain, engine=True)
    draw_weights(chunks, make_plan(plain, 1, on_gpu=True).architecture, 3, 0.1)
    first = optimizer_of(plain, chunks)
    checkpoint._optimizer_state(first, chunks, loading=True)
    generator = torch.Generator().manual_seed(0)
    (part,) = first.chained_optimizers
    for state in part.optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            # What bf16 holds exactly, so that nothing is lost on the way.
            state[name].copy_(torch.rand(state[name].shape, generator=generator).bfloat16())
    for group in part.optimizer.param_groups:
        for main in group["params"]:
            main.data.add_(torch.rand(main.shape, generator=generator) * 1e-6)
    expected = states(first)
    optimizer, last = first, chunks
    for number, config in enumerate(kinds[1:]):
        target = save(folder / f"state_{number}", last, optimizer)
        last = build(config, engine=True)
        optimizer = optimizer_of(config, last)
        load_all(target, last, optimizer, 5)
        (part,) = optimizer.chained_optimizers
        if config is precise:
            assert {s["exp_avg"].dtype for s in part.optimizer.state.values()} == {torch.bfloat16}
        assert all(a.equal(b) for a, b in zip(expected, states(optimizer), strict=True))
        assert {group["step"] for group in part.optimizer.param_groups} == {5}


def test_state_moves_between_optimizers_that_keep_it_differently(tmp_path: Path) -> None:
    run_ranks(move_state, 1, tmp_path)


def precise_main_parameters(folder: Path) -> None:
    setup(Layout(1), 1, threads=1)
    plain = config_in(folder)
    precise = plain.model_copy(update={"optimizer": plain.optimizer.model_copy(update=PRECISE)})
    chunks = build(precise, engine=True)
    originals: Originals = {}
    draw_weights(chunks, make_plan(plain, 1, on_gpu=True).architecture, 3, 0.1, originals)
    optimizer = optimizer_of(precise, chunks)
    set_main_parameters(optimizer, originals)
    (part,) = distributed_parts(optimizer)
    for _, parameter, span in own_shards(part):
        tensors = part._get_main_param_and_optimizer_states(parameter)
        expected = originals[parameter] if parameter in originals else parameter.detach().float()
        assert torch.equal(tensors["param"], expected.flatten()[span])
        assert not tensors["exp_avg"].any()
    assert originals


def test_main_parameters_within_the_engine_s_optimizer_begin_with_what_was_drawn(tmp_path: Path) -> None:
    run_ranks(precise_main_parameters, 1, tmp_path)


def histories(chunks: list[LanguageModel]) -> list[torch.Tensor]:
    """The maxima of activations and weights that each linear layer remembers, as a step in FP8 makes them."""
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch import quantization

    # Outside a step it would ask the card which recipe is its best.
    quantization.get_default_fp8_recipe = DelayedScaling
    found = []
    for module in chunks[0].modules():
        if hasattr(module, "fp8_meta") and hasattr(module, "weight"):
            if not module.fp8_meta["fp8_checkpoint"]:
                recipe = DelayedScaling(amax_history_len=4)
                module.fp8_meta |= {"num_gemms": 1, "fp8_checkpoint": True, "recipe": recipe}
                module.init_fp8_meta_tensors(recipe)
            found.append(module.fp8_meta["scaling_fwd"].amax_history)
    return found


def move_history(folder: Path) -> None:
    """A resumed run takes its own; another run that begins from the checkpoint starts with none."""
    setup(Layout(1), 1, threads=1)
    config = config_in(folder, fp8="hybrid")
    chunks = build(config, engine=True)
    draw_weights(chunks, make_plan(config, 1, on_gpu=True).architecture, 3, 0.1)
    optimizer = optimizer_of(config, chunks)
    kept = histories(chunks)
    for number, history in enumerate(kept):
        history.fill_(number + 1.0)
    assert len(kept) == 4 * chunks[0].config.num_layers
    target = save(folder / "whole", chunks, optimizer)
    for resumes in (True, False):
        others = build(config, engine=True)
        if resumes:
            load_all(target, others, optimizer_of(config, others), 5)
        else:
            load_weights(target, others)
        assert same(weights(chunks), weights(others))
        found = histories(others)
        assert all(a.equal(b) if resumes else not b.any() for a, b in zip(kept, found, strict=True))


def test_the_history_of_delayed_scaling_comes_back_with_a_resumed_run_alone(tmp_path: Path) -> None:
    run_ranks(move_history, 1, tmp_path)
