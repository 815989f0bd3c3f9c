"""Ranks agree on whether an evaluation failed, so that it ends on all of them or on none.

What no agreement reaches is a rank that waits inside a collective for one that has left its forward pass: a collective
cannot be taken back, by gloo or by NCCL, and a group that lost one cannot be used again. That run ends, and soon.
"""

import time

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megacpt.errors import UserError
from megacpt.runtime.setup import RankLost

PATIENCE_S = 60.0
"""How long a rank whose forward pass raised waits for ranks that it shares a model with: they raise at about the same
time, or never come."""


def first_failure(own: Exception | None) -> str | None:
    """What went wrong on the first rank on which anything did; the same on every rank, and None if nothing did.

    A collective call.

    Raises:
        RankLost: something went wrong here, and not all ranks come to agree on it within PATIENCE_S.
    """
    failed = torch.tensor([float(own is not None)], device=torch.cuda.current_device())
    agreed = dist.all_reduce(failed, dist.ReduceOp.MAX, async_op=True)
    assert agreed is not None
    if own is not None and parallel_state.get_data_parallel_world_size() < dist.get_world_size():
        _wait(agreed, own)
    agreed.wait()
    if not failed.item():
        return None
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if own is None else sentence_of(own))
    return next(sentence for sentence in told if sentence is not None)


def sentence_of(error: Exception) -> str:
    """An error in one line; with its type, unless it is a user's or the system's."""
    words = " ".join(str(error).split())
    if isinstance(error, UserError | OSError):
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _wait(agreed: dist.Work, own: Exception) -> None:
    # Polled, for NCCL's wait() returns at once and gloo's timeout would be the whole group's.
    deadline = time.monotonic() + PATIENCE_S
    while not agreed.is_completed():
        if time.monotonic() > deadline:
            raise RankLost(
                f"evaluation failed on rank {dist.get_rank()} alone, inside a forward pass in which others wait for it "
                f"for good ({sentence_of(own)}); start the same command again"
            ) from own
        time.sleep(0.05)
