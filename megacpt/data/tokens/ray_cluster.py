"""Encoding on a Ray cluster: blocks travel to tasks and tokens come back, in order; files are read and written here."""

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from megacpt.data.text.documents import Block
from megacpt.data.text.rows import WrongRow
from megacpt.data.tokens.cluster import connected, fetched, import_ray
from megacpt.data.tokens.encode import EncodedBlock, Encoding, encode_block
from megacpt.data.tokens.fast_tokenizer import open_tokenizer
from megacpt.data.tokens.pool import Run
from megacpt.data.tokens.tokenizer import Tokenizer
from megacpt.errors import UserError

TASK_BYTES = 1 << 22
TASKS_PER_CPU = 2
"""Tasks in flight for each CPU: one that runs, and one whose blocks are on their way."""


def encode_on_ray(encoding: Encoding, sha256: str, workers: int | None) -> Run[Block, EncodedBlock]:
    """In tasks of one CPU each on a cluster; see `cluster`.

    Every node needs megacpt, and the tokenizer at the same path.

    Args:
        sha256: of the tokenizer, which a node's must have as well.
        workers: at most so many tasks run at once; None for as many as the cluster has CPUs.

    Raises:
        UserError: ray is not installed.
    """
    ray = import_ray()

    def encoded(blocks: Iterable[Block]) -> Generator[EncodedBlock, None, None]:
        with connected(ray, workers):
            yield from _in_order(ray, blocks, encoding, sha256, workers)

    return encoded


def _in_order(
    ray: Any, blocks: Iterable[Block], encoding: Encoding, sha256: str, workers: int | None
) -> Iterator[EncodedBlock]:
    tasks = TASKS_PER_CPU * min(workers or 1 << 30, int(ray.cluster_resources().get("CPU", 1)))
    encode = ray.remote(num_cpus=1)(_encode)
    pending: deque[tuple[Any, list[Block], int]] = deque()
    waiting = 0
    for group, size in _grouped(blocks):
        task = encode.remote([block.loaded() for block in group], encoding, sha256)
        pending.append((task, [replace(block, lines=b"", columns=None) for block in group], size))
        waiting += size
        while len(pending) >= tasks or waiting > 2 * tasks * TASK_BYTES:
            task, group, size = pending.popleft()
            waiting -= size
            yield from _result(ray, task, group)
    while pending:
        task, group, _ = pending.popleft()
        yield from _result(ray, task, group)


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


def _result(ray: Any, task: Any, group: Sequence[Block]) -> list[EncodedBlock]:
    """What became of the blocks, of which `group` says where they were."""
    found, error = fetched(ray, task)
    if error is not None:
        raise error.named(group[len(found)]) if isinstance(error, WrongRow) else error
    return found


# A worker process opens the tokenizer once.
_loaded = cache(open_tokenizer)


def _encode(blocks: list[Block], encoding: Encoding, sha256: str) -> tuple[list[EncodedBlock], UserError | None]:
    """The blocks encoded; or those before an error for the user, which would arrive wrapped in Ray's own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    done: list[EncodedBlock] = []
    try:
        tokenizer: Tokenizer = _loaded(encoding.tokenizer_type, encoding.tokenizer_model, encoding.engine)
        if tokenizer.sha256 != sha256:
            node = os.uname().nodename
            raise UserError(f"{encoding.tokenizer_model}: is another tokenizer on the node {node}; copy it there")
        for block in blocks:
            done.append(encode_block(block, encoding, tokenizer))
    except UserError as error:
        return done, error
    return done, None
