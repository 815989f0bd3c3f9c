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
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from megacpt import __version__
from megacpt.data.documents import Block, Source, find_inputs, parse_block
from megacpt.data.indexed import bin_path, idx_path, token_dtype, write_index
from megacpt.data.manifest import InputFile, Manifest, TokenizerInfo, manifest_path, write_manifest
from megacpt.data.progress import Progress, Totals
from megacpt.data.tokenizer import Tokenizer, load_tokenizer
from megacpt.errors import UserError
from megacpt.files import atomic_write, disk_errors

BLOCKS_PER_WORKER = 3
"""Blocks read ahead for each process: enough to keep it busy, few enough to bound memory."""


@dataclass(frozen=True)
class Encoding:
    """How a row becomes tokens; what a worker process is told."""

    keys: tuple[str, ...]
    tokenizer_type: str
    tokenizer_model: str
    append_eod: bool
    skip_invalid: bool


@dataclass(frozen=True)
class Job:
    """A whole run. `log_interval` is in documents; None reports every few seconds."""

    inputs: tuple[str, ...]
    output_prefix: str
    encoding: Encoding
    workers: int = 1
    overwrite: bool = False
    log_interval: int | None = None


@dataclass(frozen=True)
class EncodedBlock:
    """Tokens of a block: per key, the bytes for `.bin` and int32 [documents] lengths; and what it took."""

    tokens: list[bytes]
    lengths: list[np.ndarray]
    skipped: Counter[str]
    consumed: int
    text: int


@dataclass
class Output:
    """One key's dataset in the making: its open `.bin` and the tokens of each document so far (int32)."""

    key: str
    prefix: str
    handle: IO[bytes]
    lengths: array


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
    tokenizer = load_tokenizer(encoding.tokenizer_type, encoding.tokenizer_model)
    if encoding.append_eod and tokenizer.eod_id is None:
        raise UserError(
            f"{encoding.tokenizer_model}: this tokenizer names no end-of-document token, which --append-eod needs; "
            "declare eos_token in tokenizer_config.json beside it, or drop --append-eod"
        )
    prefixes = [f"{job.output_prefix}_{key}_document" for key in encoding.keys]
    for prefix in prefixes:
        _clear_the_way(prefix, job.overwrite)
    with ExitStack() as stack:
        outputs = [
            Output(key, prefix, stack.enter_context(atomic_write(bin_path(prefix))), array("i"))
            for key, prefix in zip(encoding.keys, prefixes, strict=True)
        ]
        blocks = (block for source in sources for block in source.blocks(encoding.keys))
        progress = Progress(sum(source.size for source in sources), job.log_interval)
        skipped = _stream(_encoded(blocks, job, tokenizer), outputs, progress)
        inputs = [source.record() for source in sources]
        return _finish(outputs, encoding, tokenizer, inputs, skipped)


def _check(job: Job) -> None:
    if job.workers < 1:
        raise UserError(f"--workers {job.workers}: there must be at least one")
    if len(set(job.encoding.keys)) != len(job.encoding.keys):
        raise UserError(f"--json-keys {' '.join(job.encoding.keys)}: give each key once")


def _clear_the_way(prefix: str, overwrite: bool) -> None:
    """Refuse to replace a dataset unasked; remove temporary files of runs that were killed."""
    existing = [str(path) for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)) if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{', '.join(existing)}: exists already; pass --overwrite or choose another --output-prefix")
    for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)):
        for partial in path.parent.glob(f".{path.name}.*.partial"):
            owner = partial.name.split(".")[-2]
            if owner.isdigit() and not _runs(int(owner)):
                with disk_errors(partial):
                    partial.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def encode_block(block: Block, encoding: Encoding, tokenizer: Tokenizer) -> EncodedBlock:
    """Parse and encode one block.

    Raises:
        UserError: a bad row, unless they are to be skipped.
    """
    dtype = token_dtype(tokenizer.vocab_size).newbyteorder("<")
    skipped: Counter[str] = Counter()
    rows = [texts for _, texts in parse_block(block, encoding.keys, skipped if encoding.skip_invalid else None)]
    tokens, lengths = [], []
    for column in range(len(encoding.keys)):
        documents = tokenizer.encode_batch([texts[column] for texts in rows], add_special_tokens=True)
        if encoding.append_eod:
            eod = np.asarray([tokenizer.eod_id], dtype=np.int32)
            documents = [np.concatenate([ids, eod]) if len(ids) else ids for ids in documents]
        tokens.append(np.concatenate([np.empty(0, np.int32), *documents]).astype(dtype).tobytes())
        lengths.append(np.fromiter(map(len, documents), dtype=np.int32, count=len(documents)))
    return EncodedBlock(tokens, lengths, skipped, block.consumed, block.size)


_loaded = cache(load_tokenizer)


def _encode_in_worker(block: Block, encoding: Encoding) -> EncodedBlock:
    return encode_block(block, encoding, _loaded(encoding.tokenizer_type, encoding.tokenizer_model))


def _encoded(blocks: Iterable[Block], job: Job, tokenizer: Tokenizer) -> Iterator[EncodedBlock]:
    """Blocks in their order, encoded here or in `workers` processes."""
    if job.workers == 1:
        for block in blocks:
            yield encode_block(block, job.encoding, tokenizer)
        return
    import multiprocessing

    pending: deque[Any] = deque()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(job.workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            for block in blocks:
                pending.append(pool.submit(_encode_in_worker, block, job.encoding))
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
    """Make a worker end when the main process is killed, instead of waiting for work for ever."""
    import multiprocessing
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    assert parent is not None

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


def _finish(
    outputs: Sequence[Output],
    encoding: Encoding,
    tokenizer: Tokenizer,
    inputs: list[InputFile],
    skipped: Counter[str],
) -> dict[str, Manifest]:
    """Write index and manifest of each key while its `.bin` still has its temporary name."""
    dtype = token_dtype(tokenizer.vocab_size)
    info = TokenizerInfo(tokenizer.type, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod_id)
    manifests: dict[str, Manifest] = {}
    for output in outputs:
        lengths = np.frombuffer(output.lengths, dtype=np.int32)
        if not lengths.any():
            why = f" ({_counts(skipped)} skipped)" if skipped else ""
            raise UserError(f"the corpus is empty: no document has any text under {output.key!r}{why}; check --input")
        output.handle.flush()
        os.fsync(output.handle.fileno())
        manifests[output.prefix] = Manifest(
            megacpt_version=__version__,
            inputs=inputs,
            json_key=output.key,
            tokenizer=info,
            append_eod=encoding.append_eod,
            documents=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            empty_documents=int((lengths == 0).sum()),
            dtype=dtype.name,
            skipped=dict(sorted(skipped.items())),
        )
    written: list[Path] = []
    try:
        for output in outputs:
            bin_path(output.prefix).unlink(missing_ok=True)
            lengths = np.frombuffer(output.lengths, dtype=np.int32)
            documents = np.concatenate([[0], np.cumsum(lengths > 0)])
            written += [idx_path(output.prefix), manifest_path(output.prefix)]
            write_index(output.prefix, dtype, lengths[lengths > 0], documents)
            write_manifest(output.prefix, manifests[output.prefix])
    except BaseException:
        for path in filter(Path.is_file, written):
            path.unlink()
        raise
    return manifests


def _counts(skipped: Counter[str]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(skipped.items()))
