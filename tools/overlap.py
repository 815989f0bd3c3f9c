"""Say which items of evaluation sets a text contains: N consecutive words in common (13 unless told otherwise)."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megacpt.data.scores.overlap import NGRAM, EvalOverlap, Evaluation
from megacpt.data.text.filtering import iter_documents
from megacpt.data.text.inputs import find_inputs
from megacpt.data.text.provenance import Filters
from megacpt.errors import exit_code


def run(options: argparse.Namespace) -> list[EvalOverlap]:
    """Look through the reference."""
    evaluation = Evaluation(options.eval_set, options.ngram, options.eval_keys)
    for _, (text,) in iter_documents(find_inputs(options.reference), [options.json_key], Filters(options.skip_invalid)):
        evaluation.look_in(text)
    return evaluation.report()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when done, whatever was found, 2 on a user's mistake."""
    parser = argparse.ArgumentParser(
        description="Say which items of evaluation sets a text contains.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--reference", nargs="+", required=True, metavar="FILE|DIR|GLOB", help="the text, as in tools/preprocess.py")
    add("--json-key", default="text", metavar="KEY", help="the key that holds the text")
    add("--eval-set", nargs="+", type=Path, required=True, metavar="FILE", help="JSON or JSON Lines, plain or gzip")
    add("--eval-keys", nargs="+", default=[], metavar="KEY", help="look at these keys of an item (default: all)")
    add("--ngram", type=int, default=NGRAM, metavar="N", help="words in a row that make an overlap")
    add("--skip-invalid", action="store_true", help="pass over bad rows instead of stopping at the first")

    def work() -> None:
        for entry in run(parser.parse_args(arguments)):
            print(entry.sentence())

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
