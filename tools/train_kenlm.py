"""Train the KenLM model that tools/score.py scores a corpus with, on reference text: MODEL and MODEL.json beside it.

The defaults are CCNet's normalisation (Wenzek et al. 2019) and 5-grams of words with interpolated modified Kneser-Ney
smoothing. lmplz is taken from KENLM_BIN, PATH or the cache, else built from the source of the package kenlm; a small
trainer in Python takes its place for up to 5 million words.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megacpt.data.scores.kenlm_model import ModelRecord
from megacpt.data.scores.kenlm_train import STRUCTURES, TRAINERS, TrainJob, train
from megacpt.data.scores.normalize import PUNCTUATION, Normalization
from megacpt.data.scores.overlap import NGRAM, EvalOverlap
from megacpt.data.text.filtering import DEDUP
from megacpt.data.text.provenance import Filters
from megacpt.errors import exit_code


def parse(arguments: Sequence[str] | None = None) -> TrainJob:
    """The command line as a TrainJob; --help says what each option means."""
    parser = argparse.ArgumentParser(
        description="Train a KenLM model on reference text.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE|DIR|GLOB", help="reference text, as in tools/preprocess.py")
    add("--json-key", default="text", metavar="KEY", help="the key that holds the text")
    add("--output", required=True, type=Path, metavar="MODEL", help="writes MODEL and MODEL.json")
    add("--order", type=int, default=5, metavar="N", help="words of the longest n-gram, 2 to 6")
    add("--keep-case", action="store_true", help="do not put letters into lower case")
    add("--keep-accents", action="store_true", help="do not take accents off letters")
    add("--keep-digits", action="store_true", help="do not make every digit a 0 (trials then look like prose)")
    add("--punctuation", choices=PUNCTUATION, default="map", help="typographic marks: to ASCII, removed, or kept")
    add("--trainer", choices=TRAINERS, default="auto", help="auto: lmplz where it is or can be built, else python")
    add("--pruning", nargs="+", type=int, default=[], metavar="COUNT", help="as lmplz --prune, for instance 0 0 1")
    add("--structure", choices=tuple(STRUCTURES), default="probing", help="fast, small, or smaller (8 bits)")
    add("--memory", default="1G", help="lmplz's sorting memory")
    add("--eval-set", nargs="+", type=Path, default=[], metavar="FILE", help="warn where the reference holds its items")
    add("--eval-keys", nargs="+", default=[], metavar="KEY", help="look at these keys of an item (default: all)")
    add("--overlap-ngram", type=int, default=NGRAM, metavar="N", help="words in a row that make an overlap")
    add("--skip-invalid", action="store_true", help="pass over bad rows instead of stopping at the first")
    add("--dedup", choices=DEDUP, default="none", help="exact: count equal texts once")
    add("--overwrite", action="store_true", help="replace an existing model")
    options = parser.parse_args(arguments)
    return TrainJob(
        inputs=tuple(options.input),
        output=options.output,
        json_key=options.json_key,
        order=options.order,
        normalization=Normalization(
            not options.keep_case, not options.keep_accents, not options.keep_digits, options.punctuation
        ),
        filters=Filters(skip_invalid=options.skip_invalid, dedup=options.dedup),
        trainer=options.trainer,
        pruning=tuple(options.pruning),
        structure=options.structure,
        eval_sets=tuple(options.eval_set),
        eval_keys=tuple(options.eval_keys),
        ngram=options.overlap_ngram,
        memory=options.memory,
        overwrite=options.overwrite,
    )


def summary(job: TrainJob, record: ModelRecord) -> str:
    """One line on a finished model."""
    reference = record.reference
    return (
        f"{job.output}: {record.order}-grams of {reference['words']:,} words in {reference['documents']:,} documents, "
        f"{sum(record.ngrams):,} n-grams, {record.file}, trained by {record.trainer['program']}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when done, 2 on a user's mistake."""
    return exit_code(lambda: run(parse(arguments)), "interrupted; nothing was written")


def run(job: TrainJob) -> None:
    """Train, and say what came of it."""
    record = train(job)
    for entry in record.overlap:
        if entry["overlapping"]:
            print(f"warning: the reference overlaps {EvalOverlap(**entry).sentence()}", file=sys.stderr)
    print(summary(job, record))


if __name__ == "__main__":
    sys.exit(main())
