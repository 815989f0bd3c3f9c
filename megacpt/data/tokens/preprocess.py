"""From text files to `PREFIX.{bin,idx,json}`: read in order, encode in N processes, write in order.

The bytes are those of Megatron-LM's tools/preprocess_data.py: what the tokenizer's post-processor frames a text with is
kept, EOD is appended to documents that have tokens, and a document without tokens is one without sequences.
They depend neither on the number of workers nor on where these are, nor on interruptions: the same command goes on.
Nothing on this path imports torch.
"""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megacpt import __version__
from megacpt.data.text import documents
from megacpt.data.text.documents import Source
from megacpt.data.text.filtering import DEDUP, DUPLICATES, TOO_SHORT
from megacpt.data.text.inputs import find_inputs
from megacpt.data.tokens.encode import Encoding
from megacpt.data.tokens.fast_tokenizer import chosen_engine, open_tokenizer
from megacpt.data.tokens.indexed import bin_path, token_dtype
from megacpt.data.tokens.interrupt import held_back
from megacpt.data.tokens.manifest import Manifest, ShardInfo, TokenizerInfo
from megacpt.data.tokens.outputs import Dataset, clear_the_way, finish
from megacpt.data.tokens.shards import WHOLE, Shard, share
from megacpt.data.tokens.stream import Reporting, stream
from megacpt.data.tokens.tokenizer import Tokenizer
from megacpt.data.tokens.versions import installed_version
from megacpt.data.tokens.work import Work
from megacpt.data.tokens.workers import Encode, encode_here, encode_in_processes, encode_with
from megacpt.errors import UserError

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Job:
    """A whole run.

    Attributes:
        workers: processes; None for one, or for all CPUs of a Ray cluster.
        log_interval: documents between lines on progress; None reports every few seconds.
        engine: where blocks are encoded: "local" or "ray".
        shard: which part of the inputs this run encodes.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    encoding: Encoding
    workers: int | None = None
    overwrite: bool = False
    log_interval: int | None = None
    engine: str = "local"
    shard: Shard = WHOLE


def preprocess(job: Job) -> dict[str, Manifest]:
    """Encode the inputs; write one dataset a key, `OUTPUT_PREFIX_<key>_document`, and return prefix -> manifest.

    A dataset is complete once its `.bin` has its name: that rename comes last. What was done when a run ended early
    lies in the folder `.OUTPUT_PREFIX_<first key>_document.partial`; the same job goes on from there.

    Raises:
        UserError: anything about the inputs, the tokenizer or the outputs that the user can put right.
        KeyboardInterrupt: on Ctrl-C and SIGTERM, saying what is kept.
    """
    # One process is one thread: `workers` says how many of each there are.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _check(job)
    paths = find_inputs(job.inputs)
    first_input, sources = share(paths, job.shard)
    tokenizer = _open_tokenizer(job.encoding)
    prefixes = [f"{job.output_prefix}_{key}_document{job.shard.suffix}" for key in job.encoding.keys]
    datasets = [Dataset(key, prefix) for key, prefix in zip(job.encoding.keys, prefixes, strict=True)]
    common, identity = _identity(job, tokenizer, paths)
    folder = Path(prefixes[0]).with_name(f".{Path(prefixes[0]).name}.partial")
    # Processes of its own start before the work folder is locked.
    with _encoder(job, tokenizer) as encode:
        work = Work(folder, identity, sources, [bin_path(prefix) for prefix in prefixes], job.encoding.skip_invalid)
        try:
            if not work.finishing:
                for prefix in prefixes:
                    clear_the_way(prefix, job.overwrite)
            _announce(work, sources)
            work.open(encode.settle)
            if not work.finishing:
                with held_back() as check:
                    stream(work, sources, first_input, job.encoding, encode, Reporting(job.log_interval, check))
            manifests = finish(
                work, datasets, _filled_in(replace(common, engine=tokenizer.engine), work, job, identity, first_input)
            )
        except BaseException as error:
            kept = _give_up(work, sources, error)
            if kept and isinstance(error, UserError | KeyboardInterrupt):
                raise type(error)(f"{error or 'interrupted'} ({kept})") from error
            raise
        work.remove()
        return manifests


def _check(job: Job) -> None:
    if job.workers is not None and job.workers < 1:
        raise UserError(f"--workers {job.workers}: there must be at least one")
    if len(set(job.encoding.keys)) != len(job.encoding.keys):
        raise UserError(f"--json-keys {' '.join(job.encoding.keys)}: give each key once")
    if job.encoding.min_chars < 0:
        raise UserError(f"--min-chars {job.encoding.min_chars}: must not be negative")
    if job.encoding.dedup not in DEDUP or job.engine not in ENGINES:
        raise UserError(f"--dedup is one of {', '.join(DEDUP)} and --engine one of {', '.join(ENGINES)}")


def _open_tokenizer(encoding: Encoding) -> Tokenizer:
    tokenizer = open_tokenizer(encoding.tokenizer_type, encoding.tokenizer_model, encoding.engine)
    if encoding.append_eod and tokenizer.eod_id is None:
        raise UserError(
            f"{encoding.tokenizer_model}: this tokenizer names no end-of-document token, which --append-eod needs; "
            "declare eos_token in tokenizer_config.json beside it, or drop --append-eod"
        )
    return tokenizer


def _encoder(job: Job, tokenizer: Tokenizer) -> AbstractContextManager[Encode]:
    if job.engine == "ray":
        from megacpt.data.tokens.ray_cluster import encode_on_ray

        encoding = replace(job.encoding, engine=chosen_engine(tokenizer))
        return encode_with(encode_on_ray(encoding, tokenizer.sha256, job.workers))
    if job.workers in (None, 1):
        return encode_here(job.encoding, tokenizer)
    assert job.workers is not None
    return encode_in_processes(job.encoding, tokenizer, job.workers)


def _identity(job: Job, tokenizer: Tokenizer, paths: Sequence[Path]) -> tuple[Manifest, dict[str, Any]]:
    """What is known of the manifest before anything is read, and what the work of a run depends on."""
    encoding = job.encoding
    common = Manifest(
        megacpt_version=__version__,
        inputs=[],
        json_keys=list(encoding.keys),
        tokenizer=TokenizerInfo(tokenizer.type, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod_id),
        append_eod=encoding.append_eod,
        dtype=token_dtype(tokenizer.vocab_size).name,
        filters=encoding.filters,
        tokenizer_model=str(Path(encoding.tokenizer_model).resolve()),
        engine=tokenizer.engine,
        versions=_versions(),
    )
    identity = {
        "megacpt": __version__,
        "versions": common.versions,
        "keys": common.json_keys,
        "tokenizer": vars(common.tokenizer),
        "engine": common.engine,
        "append_eod": encoding.append_eod,
        "min_chars": encoding.min_chars,
        "dedup": encoding.dedup,
        "itemsize": np.dtype(common.dtype).itemsize,
        "block_bytes": documents.BLOCK_BYTES,
    }
    if job.shard.count > 1:
        # Where a job's part lies depends on the sizes of all files.
        files = [[path.name, Source(path).size] for path in paths]
        identity["corpus"] = hashlib.sha256(json.dumps([identity, files, job.shard.count]).encode()).hexdigest()
        identity["shard"] = job.shard.index
    return common, identity


def _versions() -> dict[str, str]:
    found = {name: installed_version(name) for name in ("tokenizers", "sentencepiece", "gigatoken")}
    return {"python": platform.python_version()} | {name: it for name, it in found.items() if it is not None}


def _announce(work: Work, sources: Sequence[Source]) -> None:
    if work.stale:
        print(f"{work.folder}: holds the work of another job or of other inputs; starting afresh", file=sys.stderr)
    if work.found:
        share_done = min(1.0, work.position.consumed / max(1, sum(source.part_size for source in sources)))
        files = f"{work.position.inputs:,} of {len(sources):,} input files, {share_done:.1%} of their bytes"
        print(f"going on after {work.found:,} documents that are done ({files})", file=sys.stderr)


def _filled_in(common: Manifest, work: Work, job: Job, identity: dict[str, Any], first_input: int) -> Manifest:
    """The manifest with what the run has found."""
    position = work.position
    bad_rows = {kind: n for kind, n in sorted(position.counts.items()) if kind not in (TOO_SHORT, DUPLICATES)}
    shard = None
    if job.shard.count > 1:
        shard = ShardInfo(
            job.shard.index, job.shard.count, identity["corpus"], first_input, position.start, position.stop
        )
    return replace(
        common,
        inputs=work.records,
        skipped=bad_rows,
        too_short=position.counts.get(TOO_SHORT, 0),
        duplicates=position.counts.get(DUPLICATES, 0),
        shard=shard,
    )


def _give_up(work: Work, sources: Sequence[Source], error: BaseException) -> str:
    """Note what was done, if it is worth it, else delete it; say what is kept."""
    position = work.position
    if work.untouched:
        work.leave()
        return ""
    if work.worth or (isinstance(error, KeyboardInterrupt) and position.documents):
        # What an earlier note says holds even if there is no room for another one.
        with suppress(UserError, OSError):
            work.note(sources[position.inputs] if position.place else None)
        work.leave()
        return (
            f"{work.noted:,} documents are kept in {work.folder}: the same command goes on after them, "
            "or from the start of the first input file that has changed"
        )
    work.remove()
    return "nothing was kept"
