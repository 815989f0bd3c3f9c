"""Select the documents of a token dataset that a training run reads: SUBSET (ranked document numbers) and SUBSET.json.

Documents are ranked by score (equal scores by number) or at random, and taken from the top until they hold the budget
in tokens of the dataset. --drop-tail leaves out the extreme of the chosen end first: the very lowest perplexities are
boilerplate and repetitions. A subset of a smaller budget is the beginning of that of a larger one. Documents without
tokens are never taken.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megacpt.config.quantity import parse_count, parse_share
from megacpt.data.scores.histogram import check_plotting, plot_scores
from megacpt.data.subset.select_run import Selected, SelectJob, select
from megacpt.data.subset.selection import ORDERS
from megacpt.errors import UserError, exit_code


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --help says what each option means."""
    parser = argparse.ArgumentParser(
        description="Select a subset of a token dataset by score or at random.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", required=True, metavar="PREFIX", help="the token dataset")
    add("--scores", type=Path, metavar="SCORES", help="its scores, of tools/score.py; not needed at random")
    add("--tokens", required=True, metavar="N", help="the budget: 5B, 500M, 1.5T or a plain number")
    add("--order", required=True, choices=ORDERS, help="which scores come first")
    add("--drop-tail", default="0%", metavar="SHARE", help="leave out this share of documents at the chosen end first")
    add("--seed", type=int, default=1234, metavar="S", help="of the random order")
    add("--output", required=True, type=Path, metavar="SUBSET", help="raw int64, or NumPy's format if it ends in .npy")
    add("--materialize", metavar="PREFIX2", help="also copy the documents, in rank order, into a dataset of their own")
    add("--eval-set", nargs="+", type=Path, default=[], metavar="FILE", help="warn unless the reference is clear of it")
    add("--plot", type=Path, metavar="PNG", help="draw how the scores are distributed, with the threshold")
    add("--overwrite", action="store_true", help="replace existing outputs")
    return parser.parse_args(arguments)


def quantity[Number: (int, float)](option: str, text: str, read: Callable[[str], Number]) -> Number:
    """A number that `read` understands, or a sentence that names the option."""
    try:
        return read(text)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error


def run(options: argparse.Namespace) -> Selected:
    """Select as the options say; warn of overlap."""
    if options.plot is not None and options.scores is None:
        raise UserError("--plot draws scores; give --scores")
    if options.plot is not None:
        check_plotting()
    job = SelectJob(
        data=options.data,
        tokens=quantity("--tokens", options.tokens, parse_count),
        order=options.order,
        output=options.output,
        scores=options.scores,
        drop_tail=quantity("--drop-tail", options.drop_tail, parse_share),
        seed=options.seed,
        materialize=options.materialize,
        eval_sets=tuple(options.eval_set),
        overwrite=options.overwrite,
        plot=options.plot,
    )
    selected = select(job)
    for warning in selected.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if options.plot is not None:
        draw(options.plot, selected)
    return selected


def draw(path: Path, selected: Selected) -> None:
    """The distribution of the scores and where the subset ends (and, with --drop-tail, begins)."""
    manifest, scores = selected.manifest, selected.scores
    assert scores is not None
    thresholds = []
    if manifest.threshold is not None and manifest.best is not None:
        thresholds.append((f"{manifest.order} {manifest.tokens:,} tokens end at", manifest.threshold))
        if manifest.dropped["tail"]:
            thresholds.append((f"{manifest.dropped['share']:.2%} dropped before", manifest.best))
    title = (
        f"{manifest.documents:,} of {manifest.dataset['documents']:,} documents, by {scores.manifest.scorer['name']}"
    )
    plot_scores(path, np.asarray(scores.values), title, scores.manifest.axis_label, thresholds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when done, 2 on a user's mistake."""
    return exit_code(lambda: tell(parse(arguments)))


def tell(options: argparse.Namespace) -> None:
    """Select, and say what came of it."""
    manifest = run(options).manifest
    ending = "" if manifest.threshold is None else f", scores {manifest.best:.4g} to {manifest.threshold:.4g}"
    print(
        f"{options.output}: {manifest.documents:,} of {manifest.dataset['documents']:,} documents, "
        f"{manifest.tokens:,} of {manifest.dataset['tokens']:,} tokens, {manifest.order}{ending}"
    )


if __name__ == "__main__":
    sys.exit(main())
