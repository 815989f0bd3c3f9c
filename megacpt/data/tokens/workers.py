"""Blocks to tokens in their order: in this process or in worker processes."""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from functools import cache

from megacpt.data.text.documents import BLOCK_BYTES, Block
from megacpt.data.tokens.encode import EncodedBlock, Encoding, encode_block
from megacpt.data.tokens.fast_tokenizer import open_tokenizer
from megacpt.data.tokens.tokenizer import Tokenizer
from megacpt.errors import UserError

BLOCKS_PER_WORKER = 3
"""Blocks read ahead for each process: enough to keep it busy, few enough to bound memory."""

Encode = Callable[[Iterable[Block]], Generator[EncodedBlock, None, None]]
"""Encodes blocks, in order, as they are asked for."""


def encode_here(encoding: Encoding, tokenizer: Tokenizer) -> Encode:
    """In this process."""
    return lambda blocks: (encode_block(block, encoding, tokenizer) for block in blocks)


def encode_in_processes(encoding: Encoding, workers: int) -> Encode:
    """In `workers` processes, each of which opens the tokenizer once."""

    def encoded(blocks: Iterable[Block]) -> Generator[EncodedBlock, None, None]:
        import multiprocessing

        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, _start_worker, (encoding,))
        pending: deque[tuple[Future[EncodedBlock], int]] = deque()
        waiting = 0
        try:
            for block in blocks:
                pending.append((pool.submit(_encode, *_by_reference(block), encoding), block.size))
                waiting += block.size
                # Blocks are of about BLOCK_BYTES unless a single row is larger.
                while (
                    len(pending) >= BLOCKS_PER_WORKER * workers
                    or waiting > 2 * BLOCKS_PER_WORKER * workers * BLOCK_BYTES
                ):
                    future, size = pending.popleft()
                    waiting -= size
                    yield future.result()
            while pending:
                yield pending.popleft()[0].result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, most likely for lack of memory; run again with fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    return encoded


# A worker process opens the tokenizer once.
_loaded = cache(open_tokenizer)


def _by_reference(block: Block) -> tuple[Block, int]:
    """A block to send to another process of this machine: without its lines, if these lie in a file, and their size."""
    return (replace(block, lines=b""), len(block.lines)) if block.plain else (block, 0)


def _encode(block: Block, unread: int, encoding: Encoding) -> EncodedBlock:
    if unread:
        with open(block.plain, "rb") as handle:
            handle.seek(block.offset)
            block = replace(block, lines=handle.read(unread))
    return encode_block(block, encoding, _loaded(encoding.tokenizer_type, encoding.tokenizer_model, encoding.engine))


def _start_worker(encoding: Encoding) -> None:
    """Make a worker end when the main process is killed, leave Ctrl-C to it, and open the tokenizer."""
    import multiprocessing
    import signal
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
    with suppress(UserError):
        _loaded(encoding.tokenizer_type, encoding.tokenizer_model, encoding.engine)
