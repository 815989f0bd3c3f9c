"""From text files to `PREFIX.{bin,idx,json}`: read in order, encode in N processes, write in order.

The bytes are those of Megatron-LM's tools/preprocess_data.py: what the tokenizer's post-processor frames a text with is
kept, EOD is appended to documents that have tokens, and a document without tokens is one without sequences.
Nothing on this path imports torch.
"""

import os
import threading
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from megacpt import __version__
from megacpt.data.documents import Block, Source, find_inputs
from megacpt.data.encode import EncodedBlock, Encoding, encode_block
from megacpt.data.fast_tokenizer import chosen_engine, open_tokenizer
from megacpt.data.indexed import bin_path, token_dtype
from megacpt.data.manifest import Manifest, TokenizerInfo
from megacpt.data.outputs import Output, clear_the_way, finish
from megacpt.data.progress import Progress, Totals
from megacpt.data.tokenizer import Tokenizer
from megacpt.errors import UserError
from megacpt.files import atomic_write

BLOCKS_PER_WORKER = 3
"""Blocks read ahead for each process: enough to keep it busy, few enough to bound memory."""


@dataclass(frozen=True)
class Job:
    """A whole run. `log_interval` is in documents; None reports every few seconds."""

    inputs: tuple[str, ...]
    output_prefix: str
    encoding: Encoding
    workers: int = 1
    overwrite: bool = False
    log_interval: int | None = None


def preprocess(job: Job) -> dict[str, Manifest]:
    """Encode the inputs; write one dataset a key, `OUTPUT_PREFIX_<key>_document`, and return prefix -> manifest.

    A dataset is complete once its `.bin` has its name: that rename comes last.

    Raises:
        UserError: anything about the inputs, the tokenizer or the outputs that the user can put right.
    """
    # One process is one thread: `workers` says how many of each there are.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    encoding = job.encoding
    _check(job)
    sources = [Source(path) for path in find_inputs(job.inputs)]
    tokenizer = _open_tokenizer(encoding)
    prefixes = [f"{job.output_prefix}_{key}_document" for key in encoding.keys]
    for prefix in prefixes:
        clear_the_way(prefix, job.overwrite)
    with ExitStack() as stack:
        outputs = [
            Output(key, prefix, stack.enter_context(atomic_write(bin_path(prefix))), array("i"))
            for key, prefix in zip(encoding.keys, prefixes, strict=True)
        ]
        blocks = (block for source in sources for block in source.blocks(encoding.keys))
        progress = Progress(sum(source.size for source in sources), job.log_interval)
        skipped = _stream(_encoded(blocks, job, tokenizer), outputs, progress)
        common = Manifest(
            megacpt_version=__version__,
            inputs=[source.record() for source in sources],
            tokenizer=TokenizerInfo(tokenizer.type, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod_id),
            append_eod=encoding.append_eod,
            dtype=token_dtype(tokenizer.vocab_size).name,
            skipped=dict(sorted(skipped.items())),
        )
        return finish(outputs, common)


def _check(job: Job) -> None:
    if job.workers < 1:
        raise UserError(f"--workers {job.workers}: there must be at least one")
    if len(set(job.encoding.keys)) != len(job.encoding.keys):
        raise UserError(f"--json-keys {' '.join(job.encoding.keys)}: give each key once")


def _open_tokenizer(encoding: Encoding) -> Tokenizer:
    tokenizer = open_tokenizer(encoding.tokenizer_type, encoding.tokenizer_model, encoding.engine)
    if encoding.append_eod and tokenizer.eod_id is None:
        raise UserError(
            f"{encoding.tokenizer_model}: this tokenizer names no end-of-document token, which --append-eod needs; "
            "declare eos_token in tokenizer_config.json beside it, or drop --append-eod"
        )
    return tokenizer


# A worker process opens the tokenizer once, at its first block.
_loaded = cache(open_tokenizer)


def _encode_in_worker(block: Block, encoding: Encoding) -> EncodedBlock:
    return encode_block(block, encoding, _loaded(encoding.tokenizer_type, encoding.tokenizer_model, encoding.engine))


def _encoded(blocks: Iterable[Block], job: Job, tokenizer: Tokenizer) -> Iterator[EncodedBlock]:
    """Blocks in their order, encoded here or in `workers` processes."""
    if job.workers == 1:
        for block in blocks:
            yield encode_block(block, job.encoding, tokenizer)
        return
    import multiprocessing

    # Every process encodes with the engine that was found here, or stops.
    encoding = replace(job.encoding, engine=chosen_engine(tokenizer))
    pending: deque[Any] = deque()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(job.workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            for block in blocks:
                pending.append(pool.submit(_encode_in_worker, block, encoding))
                if len(pending) >= BLOCKS_PER_WORKER * job.workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, most likely for lack of memory; run again with fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Make a worker end when the main process is killed, and leave Ctrl-C to the main process."""
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


def _stream(encoded: Iterator[EncodedBlock], outputs: Sequence[Output], progress: Progress) -> Counter[str]:
    """Write blocks as they come; return the counts of rows skipped."""
    skipped: Counter[str] = Counter()
    done = Totals()
    with closing(progress):
        for block in encoded:
            for output, tokens, lengths in zip(outputs, block.tokens, block.lengths, strict=True):
                output.handle.write(tokens)
                output.lengths.frombytes(lengths.tobytes())
                done.tokens += int(lengths.sum())
            skipped += block.skipped
            done.documents += len(block.lengths[0])
            done.consumed += block.consumed
            done.text += block.text
            progress.update(done)
    return skipped
