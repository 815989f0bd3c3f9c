"""The three ways to score a corpus, each made ready and with its record for the manifest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacpt.data.scores.corpora import Corpus
from megacpt.data.scores.dsir import BUCKETS, DsirModel, bucket_counts, fit
from megacpt.data.scores.kenlm_build import library_version
from megacpt.data.scores.kenlm_model import check_model
from megacpt.data.scores.normalize import Normalization
from megacpt.data.scores.overlap import Evaluation
from megacpt.data.scores.score_run import ScorerRecord
from megacpt.data.scores.scoring import ColumnSpec, KenlmSpec, open_scorer
from megacpt.data.text.filtering import iter_documents
from megacpt.data.text.inputs import find_inputs
from megacpt.data.text.provenance import Filters
from megacpt.errors import UserError
from megacpt.files import sha256_of


def kenlm_scorer(model: Path, given: Normalization | None = None) -> tuple[KenlmSpec, ScorerRecord]:
    """Perplexity under a KenLM model.

    Raises:
        UserError: as `kenlm_model.check_model`; or KenLM cannot load it.
    """
    normalization, sha256, record = check_model(model, given)
    spec = KenlmSpec(str(model.resolve()), normalization)
    open_scorer(spec)
    found: dict[str, Any] = {
        "name": "kenlm",
        "model_sha256": sha256,
        "normalization": normalization.as_dict(),
        "library": library_version(),
        "order": record.order if record else None,
        "reference": record.reference if record else None,
        "overlap": record.overlap if record else [],
    }
    return spec, ScorerRecord(found, "lower_is_better")


@dataclass(frozen=True)
class DsirOptions:
    """What DSIR is fitted to: see `dsir`. `raw_bytes`: of the corpus, how much is sampled."""

    reference: tuple[str, ...]
    json_key: str = "text"
    raw_bytes: int = 64_000_000
    length_normalized: bool = False
    eval_sets: tuple[Path, ...] = ()


def dsir_scorer(options: DsirOptions, corpus: Corpus) -> tuple[DsirModel, ScorerRecord]:
    """Importance weights: fit the two bags of n-grams to the reference and to a sample of the corpus.

    Raises:
        UserError: no reference, or one without text.
    """
    if not options.reference:
        raise UserError("--scorer dsir needs --reference: files of the text that the corpus should come to look like")
    paths = find_inputs(options.reference)
    evaluation = Evaluation(options.eval_sets) if options.eval_sets else None
    target = bucket_counts(_looked_into(paths, options.json_key, evaluation))
    if not target.any():
        raise UserError(f"the reference holds no word under {options.json_key!r}; check --reference and --json-keys")
    model = fit(target, bucket_counts(corpus.sample(options.raw_bytes)), options.length_normalized)
    inputs = [{"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths]
    found = {
        "name": "dsir",
        "model_sha256": model.sha256,
        "buckets": BUCKETS,
        "length_normalized": options.length_normalized,
        "raw_bytes": options.raw_bytes,
        "reference": {"inputs": inputs, "json_key": options.json_key, "ngrams": int(target.sum())},
        "overlap": [entry.as_dict() for entry in evaluation.report()] if evaluation else [],
    }
    return model, ScorerRecord(found, "higher_is_better")


def _looked_into(paths: Sequence[Path], key: str, evaluation: Evaluation | None) -> Iterator[str]:
    for _, (text,) in iter_documents(paths, [key], Filters()):
        if evaluation is not None:
            evaluation.look_in(text)
        yield text


def column_scorer(name: str, lower_is_better: bool) -> tuple[ColumnSpec, ScorerRecord]:
    """A number that each row came with."""
    if not name:
        raise UserError("--scorer column: names no key; write it as column:NAME")
    direction = "lower_is_better" if lower_is_better else "higher_is_better"
    return ColumnSpec(name), ScorerRecord({"name": f"column:{name}", "overlap": []}, direction)
