"""Run a function on N processes, of gloo on CPUs or NCCL on GPUs: multi-rank tests as ordinary tests."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

PRELOAD = ["tests.preload"]
TIMEOUT_S = 300.0


def _rank(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    rank: int,
    world: int,
    meeting: str,
    backend: str,
    out: Connection,
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    import torch
    import torch.distributed as dist

    from megacpt.runtime.setup import quiet_third_parties, teardown

    try:
        quiet_third_parties()
        device = torch.device("cuda", rank) if backend == "nccl" else None
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world, device_id=device)
        # Pickled here: through a Connection, torch would send tensors as handles that die with this process.
        out.send_bytes(pickle.dumps((function(*arguments), None)))
    except BaseException:
        out.send_bytes(pickle.dumps((None, traceback.format_exc())))
        os._exit(1)
    teardown()


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, backend: str = "gloo") -> list[Any]:
    """Call `function(*arguments)` on `world` fresh processes that share a group; results by rank.

    The function must be importable (module level) and its results picklable. Processes of gloo see no GPU, and are
    forked from a server that has imported torch and megatron-core once. Those of NCCL have one GPU each, and start
    anew: CUDA does not survive a fork. A failure on any rank fails the test with that rank's traceback.
    """
    context: Any = multiprocessing.get_context("forkserver" if backend == "gloo" else "spawn")
    if backend == "gloo":
        context.set_forkserver_preload(PRELOAD)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if backend == "gloo" else {}
    with patch.dict(os.environ, hidden), tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        processes: list[BaseProcess] = []
        readers: list[Connection] = []
        for rank in range(world):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(function, arguments, rank, world, meeting, backend, writer))
            process.start()
            writer.close()
            processes.append(process)
            readers.append(reader)
        try:
            results = _collect(readers)
            for process in processes:
                process.join(TIMEOUT_S)
        finally:
            for process in processes:
                process.kill()
    return results


def _collect(readers: list[Connection]) -> list[Any]:
    """What each rank sent, or the first failure: a traceback, a death without one, or too long a silence."""
    results: dict[Connection, Any] = {}
    deadline = time.monotonic() + TIMEOUT_S
    while len(results) < len(readers):
        ready = wait([reader for reader in readers if reader not in results], deadline - time.monotonic())
        assert ready, f"no result from {len(readers) - len(results)} of {len(readers)} ranks in {TIMEOUT_S:.0f} s"
        for reader in ready:
            assert isinstance(reader, Connection)
            place = f"rank {readers.index(reader)} of {len(readers)}"
            try:
                value, error = pickle.loads(reader.recv_bytes())
            except EOFError:
                raise AssertionError(f"{place} died without a result") from None
            assert error is None, f"{place} failed:\n{error}"
            results[reader] = value
    return [results[reader] for reader in readers]
