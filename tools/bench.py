"""Measure megacpt beside its peers, in one run on one machine: rows to benchmarks/*.csv, and benchmarks/README.md.

    python tools/bench.py data --input TEXT.jsonl --tokenizer-type TYPE --tokenizer-model FILE [--megatron CHECKOUT]

data: preprocessing, scoring (with --kenlm), the index, reading. A tool that writes other bytes than ours has no speed.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megacpt.bench.rows import Recorder, append, describe_cpu, write_readme
from megacpt.errors import UserError, exit_code

PARTS = ("preprocess", "scoring", "index", "read")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --help says what each option means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="preprocessing, scoring, index and reading")
    add = data.add_argument
    add("--input", type=Path, required=True, metavar="TEXT.jsonl", help="text with the key `text`, uncompressed")
    add("--tokenizer-type", required=True, choices=("HuggingFaceTokenizer", "SentencePieceTokenizer"))
    add("--tokenizer-model", type=Path, required=True, metavar="FILE")
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    add("--megatron", type=Path, metavar="CHECKOUT", help="Megatron-LM's sources, for tools/preprocess_data*.py")
    add("--kenlm", type=Path, metavar="MODEL", help="a model of tools/train_kenlm.py, for scoring")
    add("--documents", type=float, default=50e6, metavar="N", help="of the index (default 50 million)")
    add("--sources", type=int, default=100, metavar="N", help="of the index")
    add("--cores", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="most cores to use")
    add("--work", type=Path, metavar="DIR", help="folder for what is written meanwhile (default: a temporary one)")
    add("--output", type=Path, default=Path("benchmarks"), metavar="DIR", help="folder of the rows")
    return parser.parse_args(arguments)


def data(options: argparse.Namespace, work: Path) -> Recorder:
    """Measure what --only names.

    Raises:
        UserError: an input is missing, or a tool fails.
    """
    if not options.input.is_file():
        raise UserError(f"{options.input}: no such file; give --input a JSONL file")
    recorder = Recorder.begin(describe_cpu())
    if "preprocess" in options.only:
        from megacpt.bench import preprocess

        case = preprocess.Case(
            options.input, options.tokenizer_type, options.tokenizer_model, work / "preprocess", options.megatron
        )
        preprocess.measure(recorder, case, options.cores)
    if "scoring" in options.only and options.kenlm is not None:
        from megacpt.bench import scoring

        scoring.measure(recorder, options.input, options.kenlm, 20)
    if "index" in options.only:
        from megacpt.bench import index

        index.measure(recorder, work / "index", int(options.documents), options.sources)
    if "read" in options.only:
        from megacpt.bench import preprocess, read

        case = preprocess.Case(options.input, options.tokenizer_type, options.tokenizer_model, work / "read")
        case.folder.mkdir(parents=True, exist_ok=True)
        command, prefix = preprocess.ours(case, options.input, 1)
        preprocess.timed(command, options.cores)
        read.measure(recorder, prefix, 2048)
    return recorder


def record(options: argparse.Namespace) -> None:
    """Measure, and write the rows."""
    with tempfile.TemporaryDirectory() as temporary:
        recorder = data(options, options.work or Path(temporary))
    append(options.output / f"{options.command}.csv", recorder.rows)
    write_readme(options.output)
    print(f"{options.output}/README.md: {len(recorder.rows)} rows more")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when done, 2 on a user's mistake."""
    options = parse(arguments)
    return exit_code(lambda: record(options))


if __name__ == "__main__":
    sys.exit(main())
