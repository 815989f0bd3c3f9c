"""Join Megatron token datasets into one, in the order given: OUT.{bin,idx} and the manifest.

The --shard outputs of tools/preprocess.py give the bytes of one run over the whole corpus; they must be all there.
"""

import argparse
import sys
from collections.abc import Sequence

from megacpt.data.tokens.merge import merge
from megacpt.errors import exit_code


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --help says what each option means."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PREFIX",
        help="datasets of one tokenizer, each as PREFIX, PREFIX.bin or PREFIX.idx",
    )
    add("--output-prefix", required=True, metavar="OUT", help="writes OUT.{bin,idx,json}")
    add("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when done, 2 on a user's mistake."""
    options = parse(arguments)
    return exit_code(lambda: run(options), "interrupted; nothing was written")


def run(options: argparse.Namespace) -> None:
    """Merge, and say what came of it."""
    manifest = merge(options.input, options.output_prefix, options.overwrite, _warn)
    if manifest is None:
        print(f"{options.output_prefix}: {len(options.input)} datasets merged, without a manifest")
        return
    duplicates = f", {manifest.duplicates:,} duplicates dropped" if manifest.duplicates else ""
    print(
        f"{options.output_prefix}: {manifest.documents:,} documents ({manifest.empty_documents:,} empty{duplicates}), "
        f"{manifest.tokens:,} tokens of {len(options.input)} datasets"
    )


def _warn(words: str) -> None:
    print(f"warning: {words}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
