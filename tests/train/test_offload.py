"""Optimizer state in host memory: megatron-core's hybrid optimizer, with host and device told apart on one CPU.

Every tensor passes for one on the device unless it was pinned; copies between the two, the CPU's AdamW and the state in
checkpoints are the real ones.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megacpt.config.tree import Config
from megacpt.runtime.setup import setup
from megacpt.train.build import build_job
from megacpt.train.job import Job
from megacpt.train.optimizer import common_optimizer_state, own_shards, updated_by
from megacpt.train.planning import make_plan
from tests.jobs import parameters_of, relative_difference, small_config, step
from tests.ranks import run_ranks

DISTRIBUTED = {"use_distributed_optimizer": True}
OFFLOAD = DISTRIBUTED | {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}


class Host(torch.Tensor):
    """A tensor in pinned host memory."""


def tell_host_from_device() -> None:
    """Where the optimizer divides its parameters, all but pinned tensors are on the device."""
    divide = HybridDeviceOptimizer._get_sub_optimizer_param_groups
    empty = torch.empty

    def divided(self: HybridDeviceOptimizer, fraction: float) -> Any:
        torch.Tensor.is_cuda = property(lambda tensor: not isinstance(tensor, Host))  # type: ignore[assignment]
        try:
            return divide(self, fraction)
        finally:
            del torch.Tensor.is_cuda

    def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs)

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = divided
    torch.Tensor.pin_memory = lambda self: self.as_subclass(Host)  # type: ignore[method-assign,assignment]
    torch.empty = unpinned  # type: ignore[assignment]


def job_of(config: Config) -> Job:
    plan = make_plan(config, dist.get_world_size(), on_gpu=True)
    job = build_job(plan, setup(plan.layout, config.train.seed, config.runtime.threads))
    if config.optimizer.optimizer_cpu_offload:
        (part,) = job.optimizer.chained_optimizers
        assert type(part.optimizer).__name__ == "HybridDeviceOptimizer"
    return job


def train(config: Config, until: int, *, save: bool = False) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step up to `until`, from where the run stands."""
    tell_host_from_device()
    job = job_of(config)
    history = [step(job) for _ in range(job.progress.iteration, until)]
    if save:
        job.save()
    return history


def configuration(folder: Path, optimizer: dict[str, Any]) -> Config:
    return small_config(folder, {"transformer_impl": "local"}, precision={"dtype": "bf16"}, optimizer=optimizer)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_steps_are_those_of_the_plain_optimizer(tmp_path: Path, fraction: float) -> None:
    offload = OFFLOAD | {"optimizer_offload_fraction": fraction}
    (plain,) = run_ranks(train, 1, configuration(tmp_path, DISTRIBUTED), 4)
    (found,) = run_ranks(train, 1, configuration(tmp_path, offload), 4)
    assert relative_difference(found, plain) < 1e-3
    (again,) = run_ranks(train, 1, configuration(tmp_path, offload), 4)
    assert again == found


@pytest.mark.parametrize("then", [OFFLOAD, DISTRIBUTED], ids=["offloaded again", "plain"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, then: dict[str, Any]) -> None:
    (whole,) = run_ranks(train, 2, configuration(tmp_path, OFFLOAD), 5)[:1]
    (begun,) = run_ranks(train_then_save, 2, configuration(tmp_path, OFFLOAD), 3)[:1]
    (rest,) = run_ranks(train, 2, configuration(tmp_path, then), 5)[:1]
    assert begun == whole[:3]
    assert len(rest) == 2
    if then is OFFLOAD:
        assert rest == whole[3:]
    assert relative_difference(rest, whole[3:]) < 1e-3


def train_then_save(config: Config, until: int) -> list[tuple[float, float]]:
    return train(config, until, save=True)


def offloaded_main_parameters(config: Config) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    tell_host_from_device()
    job = job_of(config)
    (part,) = job.optimizer.chained_optimizers
    mains = [part.optimizer.param_to_fp32_param[updated_by(part, p)].clone() for _, p, _ in own_shards(part)]
    return parameters_of(job), [main.detach().as_subclass(torch.Tensor) for main in mains]


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_main_parameters_begin_with_what_was_drawn(tmp_path: Path, fraction: float) -> None:
    offload = configuration(tmp_path, OFFLOAD | {"optimizer_offload_fraction": fraction})
    exact = offload.model_copy(
        update={
            "precision": offload.precision.model_copy(update={"dtype": "fp32"}),
            "optimizer": configuration(tmp_path, DISTRIBUTED).optimizer,
        }
    )
    ((_, found),) = run_ranks(offloaded_main_parameters, 1, offload)
    ((values, mains),) = run_ranks(drawn, 1, exact)
    assert len(found) == len(mains) == len(values)
    assert all(torch.equal(a, b) for a, b in zip(found, mains, strict=True))


def drawn(config: Config) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    job = job_of(config)
    (part,) = job.optimizer.chained_optimizers
    return parameters_of(job), [p.detach().flatten()[span] for _, p, span in own_shards(part)]


def settings(config: Config) -> dict[str, Any]:
    tell_host_from_device()
    return common_optimizer_state(job_of(config).optimizer, 7)


def test_a_checkpoint_names_no_class_that_its_reader_may_lack(tmp_path: Path) -> None:
    (found,) = run_ranks(settings, 1, configuration(tmp_path, OFFLOAD))
    for group in found["optimizer"]["param_groups"]:
        assert group["step"] == 7
        assert "cpu_optimizer_cls" not in group
        assert not any(isinstance(value, type) for value in group.values())
