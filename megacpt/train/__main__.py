"""`torchrun --nproc-per-node N -m megacpt.train --config FILE.yaml [section.key=value ...]`."""

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from megacpt.config.load import load_config
from megacpt.config.tree import Config
from megacpt.errors import UserError
from megacpt.runtime.compiler import load_megatron_core
from megacpt.runtime.engine import check_available, plans_for_gpu
from megacpt.runtime.gpu import set_gpu_environment
from megacpt.runtime.setup import (
    die_with_launcher,
    exit_code_of_rank,
    quiet_third_parties,
    setup,
    teardown,
    world_size_from_environment,
)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: --world-size is no number of ranks, or there is nothing to plan.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megacpt.train",
        description="Continual pre-training. Under torchrun every process is a rank; without it there is one.",
        epilog="The same command again resumes from the newest checkpoint in save.dir.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan; train nothing")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks to plan for (with --dry-run)")
    parser.add_argument(
        "--device",
        choices=("cpu", "gpu"),
        help="what to plan for (with --dry-run); else what is here",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the configuration")
    # Overrides may stand between the options.
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.world_size is not None and not parsed.dry_run:
        raise UserError("--world-size goes with --dry-run; to train on several ranks, start them with torchrun")
    if parsed.device is not None and not parsed.dry_run:
        raise UserError("--device goes with --dry-run; a run takes the GPUs that are there, else the CPU")
    if parsed.world_size is not None and parsed.world_size < 1:
        raise UserError(f"--world-size {parsed.world_size}: give the number of ranks to plan for, at least 1")
    return parsed


def run(parsed: argparse.Namespace) -> None:
    """Plan, then train (or print the plan).

    Raises:
        UserError: whatever in the configuration, the data or the checkpoints cannot work.
    """
    die_with_launcher()
    config = load_config(parsed.config, parsed.overrides)
    quiet_third_parties()
    graphs = config.model.cuda_graph_impl != "none"
    if not parsed.dry_run:
        # `setup` does it too, for others, but the plan asks for GPUs before that.
        set_gpu_environment(
            config.model.tensor_model_parallel_size, config.model.context_parallel_size, cuda_graphs=graphs
        )
    # Imported late: --help and a wrong key should answer before megatron-core is loaded.
    load_megatron_core()
    from megacpt.train.planning import make_plan

    world_size = parsed.world_size or world_size_from_environment()
    plan = make_plan(config, world_size, on_gpu=_on_gpu(parsed, config))
    if parsed.dry_run:
        from megacpt.train.dry_run import describe

        if is_first_rank():
            print(describe(plan))
        return
    check_available(config, plan.layers)
    rank = setup(
        plan.layout,
        config.train.seed,
        config.runtime.threads,
        config.runtime.distributed_timeout_minutes,
        cuda_graphs=graphs,
    )
    from megacpt.train.build import build_job
    from megacpt.train.loop import train
    from megacpt.train.startup import announce

    job = build_job(plan, rank)
    if job.log is not None:
        announce(job)
    train(job)
    if job.log is not None:
        job.log.summary(None if job.ended is None else str(job.ended))
        job.log.close()
    teardown()


def _on_gpu(parsed: argparse.Namespace, config: Config) -> bool:
    """Whether the plan is one for GPUs: a dry run may plan for others than are here."""
    if parsed.device is not None:
        return bool(parsed.device == "gpu")
    return plans_for_gpu(config) if parsed.dry_run else torch.cuda.is_available()


def is_first_rank() -> bool:
    """Whether this process is the one that speaks, before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after a user's mistake, told once."""
    return exit_code_of_rank(lambda: run(parse(sys.argv[1:] if arguments is None else arguments)))


if __name__ == "__main__":
    sys.exit(main())
