"""One function sets up a rank: device, process groups, seeds, threads and logging."""

import ctypes
import logging
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megacpt.errors import UserError
from megacpt.runtime.gpu import set_gpu_environment

PR_SET_PDEATHSIG = 1
"""From Linux's prctl.h: the signal that a process gets when its parent ends."""
SPOKEN = "megacpt/spoken"
"""The key in the group's store that counts the ranks with an error to tell."""
GRACE_S = 15.0
"""How long other ranks leave it to rank 0 to tell of an error."""


class RankLost(UserError):
    """This rank has left a collective in which others wait for it for good: the job has to end."""


@dataclass(frozen=True)
class Layout:
    """How ranks are divided; data parallelism takes what is left of the world."""

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    context: int = 1

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.world_size // (self.tensor * self.pipeline * self.context)

    def check(self) -> None:
        """Refuse a layout that does not fill the world exactly.

        Raises:
            UserError: the world is no multiple of TP x PP x CP.
        """
        unit = self.tensor * self.pipeline * self.context
        if self.world_size % unit:
            raise UserError(
                f"{self.world_size} processes cannot be divided into TP {self.tensor} x PP {self.pipeline} x CP "
                f"{self.context}: start a multiple of {unit} (torchrun --nproc-per-node)"
            )


@dataclass(frozen=True)
class Rank:
    """This process: its place in the world and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    threads: int

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes logs."""
        return self.rank == 0


def world_size_from_environment() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def quiet_third_parties() -> None:
    """Drop warnings that say nothing to a user: optional packages absent, GPTModel's successor, deprecations."""
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\..*")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("megatron", "torch.distributed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def die_with_launcher() -> None:
    """Ask Linux to kill this rank when torchrun dies.

    torchrun starts ranks in sessions of their own: killed with -9, it would leave them training, and writing, beside
    the run that is started next.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def setup(
    layout: Layout,
    seed: int,
    threads: int | None = None,
    timeout_minutes: float = 10.0,
    *,
    cuda_graphs: bool = False,
) -> Rank:
    """Join the process group (nccl on GPUs, gloo on CPUs) and build megatron-core's groups.

    Args:
        cuda_graphs: random states are ones that a CUDA graph can hold.

    Raises:
        UserError: the layout does not fit the world, or the rendezvous port is taken.
    """
    layout.check()
    quiet_third_parties()
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = threads or max(1, (os.cpu_count() or 1) // local_world)
    torch.set_num_threads(threads)
    set_gpu_environment(layout.tensor, layout.context, cuda_graphs=cuda_graphs)
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        from megacpt.runtime.cpu import redirect_cuda

        redirect_cuda()
        device = torch.device("cpu")
    if not dist.is_initialized():
        _join(device, timeout_minutes)
    _model_parallel_groups(layout, timeout_minutes)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)

    from megatron.core import tensor_parallel

    # While graphs are captured, Transformer Engine's attention takes no other tracker of random states than its own.
    tensor_parallel.model_parallel_cuda_manual_seed(seed, te_rng_tracker=cuda_graphs, use_cudagraphable_rng=cuda_graphs)
    return Rank(dist.get_rank(), dist.get_world_size(), local_rank, device, threads)


def _join(device: torch.device, timeout_minutes: float) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    try:
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
            device_id=device if device.type == "cuda" else None,
        )
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the rendezvous at {address} failed, the port is probably in use ({str(error).splitlines()[0]}); "
            "choose another with torchrun --master-port or --rdzv-endpoint"
        ) from error


def _model_parallel_groups(layout: Layout, timeout_minutes: float) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual,
        context_parallel_size=layout.context,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,
    )


def first_to_speak() -> bool:
    """Whether this rank is the one to tell the user of an error; the first to ask in a group is.

    Before there is a group, all ranks most likely meet the same error and rank 0 tells it. As torchrun ends all ranks
    when one has ended, the others wait here to be ended; one that nobody ends has an error of its own, and tells it.
    """
    if not dist.is_initialized():
        if os.environ.get("RANK", "0") != "0":
            time.sleep(GRACE_S)
        return True
    return _get_default_store().add(SPOKEN, 1) == 1


def another_spoke() -> bool:
    """Whether some rank of the group has told the user of an error; the others then fall over in a collective."""
    return dist.is_initialized() and _get_default_store().check([SPOKEN])


def exit_code_of_rank(work: Callable[[], object]) -> int:
    """Do the work of one rank: 0 when it is done, 2 after a user's mistake, on this rank or another, told once."""
    try:
        work()
    except UserError as error:
        if first_to_speak():
            print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, RankLost):
            # Groups cannot be left, and Python cannot end, while a collective is unfinished.
            sys.stdout.flush()
            os._exit(2)
        return 2
    except RuntimeError:
        if another_spoke():
            return 2
        raise
    return 0


def teardown() -> None:
    """Leave the groups; safe to call when setup failed half-way."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
