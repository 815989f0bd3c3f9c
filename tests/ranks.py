"""Run a function on N gloo processes and collect what each returns: multi-rank tests as ordinary tests."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOAD = ["tests.preload"]
TIMEOUT_S = 300.0


def _rank(
    function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, world: int, meeting: str, results: Any
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    import torch.distributed as dist

    from megacpt.runtime.setup import quiet_third_parties, teardown

    try:
        quiet_third_parties()
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        results.put((rank, function(*arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        os._exit(1)
    teardown()


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` on `world` fresh processes that share a gloo group; results by rank.

    The function must be importable (module level) and its results picklable. Processes are forked from a server that
    has imported torch and megatron-core once. A failure on any rank fails the test with that rank's traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        meeting = str(Path(folder) / "meeting")
        ranks = [
            context.Process(target=_rank, args=(function, arguments, rank, world, meeting, results))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        collected: dict[int, Any] = {}
        for _ in range(world):
            rank, value, error = results.get()
            if error is not None:
                for process in ranks:
                    process.kill()
                raise AssertionError(f"rank {rank} of {world} failed:\n{error}")
            collected[rank] = value
        for process in ranks:
            process.join(TIMEOUT_S)
    return [collected[rank] for rank in range(world)]
