"""Encode text files as Megatron token datasets: OUT_<key>_document.{bin,idx} and a manifest beside them."""

import argparse
import sys
from collections.abc import Sequence

from megacpt.data.encode import Encoding
from megacpt.data.fast_tokenizer import ENGINES
from megacpt.data.manifest import Manifest
from megacpt.data.preprocess import Job, preprocess
from megacpt.data.tokenizer import TOKENIZER_TYPES
from megacpt.errors import UserError


def parse(arguments: Sequence[str] | None = None) -> Job:
    """The command line as a Job; --help says what each option means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE|DIR|GLOB",
        help=".jsonl, .json (one object a line), .jsonl.gz, .jsonl.zst or .parquet; folders and globs are sorted",
    )
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys to encode, one dataset each")
    add("--output-prefix", required=True, metavar="OUT", help="writes OUT_<key>_document.{bin,idx,json}")
    add("--tokenizer-type", required=True, choices=TOKENIZER_TYPES, help="kind of tokenizer")
    add(
        "--tokenizer-model",
        required=True,
        metavar="PATH",
        help="tokenizer.json (or its folder), or SentencePiece .model",
    )
    add("--tokenizer-engine", default="auto", choices=ENGINES, help="fast where it equals the reference, else that")
    add("--append-eod", action="store_true", help="end every document that has tokens with the end-of-document token")
    add("--workers", type=int, default=1, metavar="N", help="processes; the output does not depend on it")
    add(
        "--skip-invalid",
        action="store_true",
        help="pass over bad rows and count them, instead of stopping at the first",
    )
    add("--overwrite", action="store_true", help="replace existing outputs")
    add("--log-interval", type=int, metavar="N", help="documents between progress lines (default: every few seconds)")
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
        ),
        workers=options.workers,
        overwrite=options.overwrite,
        log_interval=options.log_interval,
    )


def summary(prefix: str, manifest: Manifest) -> str:
    """One line on a finished dataset."""
    line = (
        f"{prefix}: {manifest.documents:,} documents ({manifest.empty_documents:,} empty), "
        f"{manifest.tokens:,} tokens, {manifest.dtype}"
    )
    skipped = ", ".join(f"{count:,} {kind}" for kind, count in manifest.skipped.items())
    return f"{line}; skipped rows: {skipped}" if skipped else line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when done, 2 on a user's mistake."""
    try:
        for prefix, manifest in preprocess(parse(arguments)).items():
            print(summary(prefix, manifest))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
