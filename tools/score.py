"""Score every document of a corpus: SCORES (one float32 per document of the .idx, in its order) and SCORES.json.

    kenlm          perplexity under tools/train_kenlm.py's model; lower is better
    dsir           log importance weight by hashed n-grams against --reference (arXiv 2302.03169); higher is better
    column:NAME    the number that each row has under NAME

Give --input with the files and row options of tools/preprocess.py, or --data PREFIX to decode a token dataset. A run
that was killed goes on where it was when the same command is given again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megacpt.data.scores.corpora import Corpus, TextFiles, TokenDataset
from megacpt.data.scores.histogram import check_plotting, plot_scores
from megacpt.data.scores.normalize import Normalization, spelled_normalization
from megacpt.data.scores.score_run import ScoreJob, score
from megacpt.data.scores.scorers import DsirOptions, column_scorer, dsir_scorer, kenlm_scorer
from megacpt.data.scores.scores import ScoresManifest, map_values
from megacpt.data.scores.scoring import ScorerSpec
from megacpt.data.text.filtering import DEDUP
from megacpt.data.text.inputs import find_inputs
from megacpt.data.text.provenance import Filters
from megacpt.data.tokens.pool import ENGINES
from megacpt.data.tokens.tokenizer import TOKENIZER_TYPES
from megacpt.errors import UserError, exit_code
from megacpt.files import json_beside, keep_apart


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --help says what each option means."""
    parser = argparse.ArgumentParser(
        description="Score every document of a corpus.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    corpus = parser.add_mutually_exclusive_group(required=True)
    corpus.add_argument("--input", nargs="+", metavar="FILE|DIR|GLOB", help="text, as given to tools/preprocess.py")
    corpus.add_argument("--data", metavar="PREFIX", help="a token dataset, to be decoded")
    add("--tokenizer-model", metavar="PATH", help="of --data: its tokenizer (default: where that was when it was made)")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, help="of a --data without a manifest: kind of its tokenizer")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="as in preprocessing; the first is scored")
    add("--skip-invalid", action="store_true", help="as in preprocessing")
    add("--min-chars", type=int, default=0, metavar="N", help="as in preprocessing")
    add("--dedup", choices=DEDUP, default="none", help="as in preprocessing")
    add(
        "--output", required=True, type=Path, metavar="SCORES", help="raw float32, or NumPy's format if it ends in .npy"
    )
    add("--scorer", default="kenlm", metavar="kenlm|dsir|column:NAME", help="how documents are scored")
    add("--model", type=Path, metavar="MODEL", help="kenlm: the model, with MODEL.json beside it")
    add(
        "--normalization", metavar="STEPS", help="kenlm: of a model without a record: ccnet, or steps such as lowercase"
    )
    add(
        "--reference", nargs="+", default=[], metavar="FILE", help="dsir: text that the corpus should come to look like"
    )
    add("--raw-megabytes", type=int, default=64, metavar="MB", help="dsir: how much of the corpus is sampled")
    add("--length-normalized", action="store_true", help="dsir: mean over n-grams instead of the sum")
    add(
        "--eval-set",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="dsir: note where the reference has its items",
    )
    add("--lower-is-better", action="store_true", help="column: small numbers are the good ones")
    add("--workers", type=int, default=1, metavar="N", help="processes (on Ray tasks); scores do not depend on it")
    add("--engine", choices=ENGINES, default="local", help="ray: on the cluster at RAY_ADDRESS, or one started here")
    add("--plot", type=Path, metavar="PNG", help="draw how the scores are distributed")
    add("--overwrite", action="store_true", help="replace existing scores")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> ScoresManifest:
    """Score as the options say."""
    if options.plot is not None:
        check_plotting()
    corpus = open_corpus(options)
    plot = [] if options.plot is None else [options.plot]
    keep_apart([options.output, json_beside(options.output), *plot], files_read(options, corpus))
    kind, _, name = options.scorer.partition(":")
    spec: ScorerSpec
    if kind == "kenlm" and not name:
        if options.model is None:
            raise UserError("--scorer kenlm needs --model; train one with tools/train_kenlm.py")
        if options.eval_set:
            raise UserError(
                "--eval-set is of --scorer dsir; a KenLM model is compared by tools/train_kenlm.py --eval-set"
            )
        spec, record = kenlm_scorer(options.model, normalization(options.normalization))
    elif kind == "dsir" and not name:
        raw_bytes = max(1, options.raw_megabytes) * 1_000_000
        reference, key, eval_sets = tuple(options.reference), options.json_keys[0], tuple(options.eval_set)
        dsir = DsirOptions(reference, key, raw_bytes, options.length_normalized, eval_sets)
        spec, record = dsir_scorer(dsir, corpus)
    elif kind == "column":
        spec, record = column_scorer(name, options.lower_is_better)
    else:
        raise UserError(f"--scorer {options.scorer}: unknown; choose kenlm, dsir or column:NAME")
    job = ScoreJob(options.output, spec, record, options.workers, options.engine, options.overwrite)
    manifest = score(job, corpus)
    if options.plot is not None:
        values = np.asarray(map_values(options.output, np.dtype("<f4")))
        title = f"{manifest.documents:,} documents scored by {manifest.scorer['name']}"
        plot_scores(options.plot, values, title, manifest.axis_label)
    return manifest


def open_corpus(options: argparse.Namespace) -> Corpus:
    """The text files or the token dataset to score."""
    if options.data is None:
        filters = Filters(options.skip_invalid, options.min_chars, options.dedup)
        return TextFiles(tuple(options.input), tuple(options.json_keys), filters)
    return TokenDataset(options.data, options.tokenizer_model, options.tokenizer_type)


def files_read(options: argparse.Namespace, corpus: Corpus) -> list[Path]:
    """Every file that scoring as the options say reads."""
    model = [] if options.model is None else [options.model, json_beside(options.model)]
    return [*corpus.files, *find_inputs(options.reference), *model, *options.eval_set]


def normalization(text: str | None) -> Normalization | None:
    """What --normalization says."""
    try:
        return None if text is None else spelled_normalization(text)
    except ValueError as error:
        raise UserError(f"--normalization {text}: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when done, 2 on a user's mistake."""
    return exit_code(lambda: tell(parse(arguments)), "interrupted; the same command goes on from here")


def tell(options: argparse.Namespace) -> None:
    """Score, and say what came of it."""
    manifest = run(options)
    values = np.asarray(map_values(options.output, np.dtype("<f4")))
    finite = values[np.isfinite(values)]
    quartiles = ", ".join(f"{value:.4g}" for value in np.quantile(finite, (0.25, 0.5, 0.75))) if len(finite) else "none"
    print(
        f"{options.output}: {manifest.documents:,} documents ({manifest.unscored:,} without a word) scored by "
        f"{manifest.scorer['name']}, {manifest.direction.replace('_', ' ')}; quartiles {quartiles}"
    )


if __name__ == "__main__":
    sys.exit(main())
