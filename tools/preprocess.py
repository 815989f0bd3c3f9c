"""Encode text files as Megatron token datasets: OUT_<key>_document.{bin,idx} and a manifest beside them.

The same command again goes on where a run was killed or interrupted. The output depends neither on --workers nor on
--engine, and tools/merge_datasets.py makes the very same of the outputs of jobs that had a --shard each.
"""

import argparse
import sys
from collections.abc import Sequence

from megacpt.data.text.filtering import DEDUP
from megacpt.data.tokens.encode import Encoding
from megacpt.data.tokens.fast_tokenizer import ENGINES as TOKENIZER_ENGINES
from megacpt.data.tokens.manifest import Manifest
from megacpt.data.tokens.preprocess import ENGINES, Job, preprocess
from megacpt.data.tokens.shards import WHOLE, parse_shard
from megacpt.data.tokens.tokenizer import TOKENIZER_TYPES
from megacpt.errors import exit_code


def parse(arguments: Sequence[str] | None = None) -> Job:
    """The command line as a Job; --help says what each option means."""
    parser = argparse.ArgumentParser(description=__doc__)
    _add_encoding(parser)
    _add_run(parser)
    options = parser.parse_args(arguments)
    return Job(
        inputs=tuple(options.input),
        output_prefix=options.output_prefix,
        encoding=Encoding(
            keys=tuple(options.json_keys),
            tokenizer_type=options.tokenizer_type,
            tokenizer_model=options.tokenizer_model,
            append_eod=options.append_eod,
            skip_invalid=options.skip_invalid,
            engine=options.tokenizer_engine,
            min_chars=options.min_chars,
            dedup=options.dedup,
        ),
        workers=options.workers,
        overwrite=options.overwrite,
        log_interval=options.log_interval,
        engine=options.engine,
        shard=parse_shard(options.shard) if options.shard else WHOLE,
    )


def _add_encoding(parser: argparse.ArgumentParser) -> None:
    """What is encoded, and how."""
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE|DIR|GLOB",
        help=".jsonl, .json (one object a line), .jsonl.gz, .jsonl.zst or .parquet; folders and globs are sorted",
    )
    add(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys to encode, one dataset each (default: text)",
    )
    add("--output-prefix", required=True, metavar="OUT", help="writes OUT_<key>_document.{bin,idx,json}")
    add("--tokenizer-type", required=True, choices=TOKENIZER_TYPES, help="kind of tokenizer")
    add(
        "--tokenizer-model",
        required=True,
        metavar="PATH",
        help="tokenizer.json (or its folder), or SentencePiece .model",
    )
    add(
        "--tokenizer-engine",
        default="auto",
        choices=TOKENIZER_ENGINES,
        help="fast where it equals the reference, else that (default)",
    )
    add("--append-eod", action="store_true", help="end every document that has tokens with the end-of-document token")
    add(
        "--skip-invalid",
        action="store_true",
        help="pass over bad rows and count them, instead of stopping at the first",
    )
    add("--min-chars", type=int, default=0, metavar="N", help="drop rows whose first key has fewer characters")
    add("--dedup", choices=DEDUP, default="none", help="exact: drop rows whose first key's text an earlier row had")


def _add_run(parser: argparse.ArgumentParser) -> None:
    """How the work is done."""
    add = parser.add_argument
    add("--workers", type=int, metavar="N", help="processes (default: 1, or all CPUs of the Ray cluster)")
    add("--engine", choices=ENGINES, default="local", help="ray: on the cluster of RAY_ADDRESS, or that runs here")
    add("--shard", metavar="I/N", help="encode the I-th of N parts of the inputs: 0/8, 1/8, ... 7/8")
    add("--overwrite", action="store_true", help="replace existing outputs")
    add("--log-interval", type=int, metavar="N", help="documents between progress lines (default: every few seconds)")


def summary(prefix: str, manifest: Manifest) -> str:
    """One line on a finished dataset."""
    line = (
        f"{prefix}: {manifest.documents:,} documents ({manifest.empty_documents:,} empty), "
        f"{manifest.tokens:,} tokens, {manifest.dtype}"
    )
    skipped = ", ".join(f"{count:,} {kind}" for kind, count in manifest.skipped.items())
    line += f"; skipped rows: {skipped}" if skipped else ""
    for count, kind in ((manifest.too_short, "too short"), (manifest.duplicates, "duplicates")):
        line += f"; {count:,} {kind}" if count else ""
    lengths = manifest.lengths
    if lengths is None or not manifest.documents:
        return line
    return f"{line}; tokens per document: median {lengths.median:,}, p99 {lengths.p99:,}, most {lengths.max:,}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when done, 2 on a user's mistake."""

    def work() -> None:
        for prefix, manifest in preprocess(parse(arguments)).items():
            print(summary(prefix, manifest))

    return exit_code(work, "interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
