"""Encoding on a Ray cluster: blocks travel to tasks and tokens come back, in order; files are read and written here."""

import os
import socket
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from functools import cache
from typing import Any

from megacpt.data.text.documents import Block
from megacpt.data.tokens.encode import EncodedBlock, Encoding, encode_block
from megacpt.data.tokens.fast_tokenizer import open_tokenizer
from megacpt.data.tokens.tokenizer import Tokenizer
from megacpt.data.tokens.workers import Encode
from megacpt.errors import UserError

TASK_BYTES = 1 << 22
SECONDS_TO_ANSWER = 10.0
TASKS_PER_CPU = 2
"""Tasks in flight for each CPU: one that runs, and one whose blocks are on their way."""


def encode_on_ray(encoding: Encoding, sha256: str, workers: int | None) -> Encode:
    """In tasks of one CPU each on the cluster that RAY_ADDRESS names or that runs here, else on a local one.

    Every node needs megacpt, and the tokenizer at the same path.

    Args:
        sha256: of the tokenizer, which a node's must have as well.
        workers: at most so many tasks run at once; None for as many as the cluster has CPUs.

    Raises:
        UserError: ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray: ray is not installed; pip install 'megacpt[ray]'") from error

    def encoded(blocks: Iterable[Block]) -> Generator[EncodedBlock, None, None]:
        started = _connect(ray, workers)
        try:
            yield from _in_order(ray, blocks, encoding, sha256, workers)
        finally:
            if started:
                ray.shutdown()

    return encoded


def _connect(ray: Any, workers: int | None) -> bool:
    """Join a cluster, or start one here; whether this process did either (and must leave)."""
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    named = os.environ.get("RAY_ADDRESS", "")
    try:
        _knock(named)
        ray.init(address=named or "auto", **quiet)
    except OSError as error:
        if named:
            raise UserError(
                f"--engine ray: no cluster answers at RAY_ADDRESS={named}; start it, or unset RAY_ADDRESS"
            ) from error
        ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)
    return True


def _knock(address: str) -> None:
    """Raise where nobody listens at HOST:PORT: ray itself tries for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()


def _in_order(
    ray: Any, blocks: Iterable[Block], encoding: Encoding, sha256: str, workers: int | None
) -> Iterator[EncodedBlock]:
    tasks = TASKS_PER_CPU * min(workers or 1 << 30, int(ray.cluster_resources().get("CPU", 1)))
    encode = ray.remote(num_cpus=1)(_encode)
    pending: deque[tuple[Any, int]] = deque()
    waiting = 0
    for group, size in _grouped(blocks):
        pending.append((encode.remote(group, encoding, sha256), size))
        waiting += size
        while len(pending) >= tasks or waiting > 2 * tasks * TASK_BYTES:
            task, size = pending.popleft()
            waiting -= size
            yield from _result(ray, task)
    while pending:
        yield from _result(ray, pending.popleft()[0])


def _grouped(blocks: Iterable[Block]) -> Iterator[tuple[list[Block], int]]:
    """Consecutive blocks, enough for a task, and their size."""
    group: list[Block] = []
    size = 0
    for block in blocks:
        group.append(block)
        size += block.size
        if size >= TASK_BYTES:
            yield group, size
            group, size = [], 0
    if group:
        yield group, size


def _result(ray: Any, task: Any) -> list[EncodedBlock]:
    try:
        found = ray.get(task)
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.RayTaskError):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"--engine ray: a task was lost for good ({reason}); run the same command again") from error
    if isinstance(found, str):
        raise UserError(found)
    return found


# A worker process opens the tokenizer once.
_loaded = cache(open_tokenizer)


def _encode(blocks: list[Block], encoding: Encoding, sha256: str) -> list[EncodedBlock] | str:
    """The blocks encoded, or the words for a user."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        tokenizer: Tokenizer = _loaded(encoding.tokenizer_type, encoding.tokenizer_model, encoding.engine)
        if tokenizer.sha256 != sha256:
            return f"{encoding.tokenizer_model}: is another tokenizer on the node {os.uname().nodename}; copy it there"
        return [encode_block(block, encoding, tokenizer) for block in blocks]
    except UserError as error:
        return str(error)
