"""From a dataset and its scores to a subset on disk."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megacpt import __version__
from megacpt.data.scores.overlap import EvalOverlap
from megacpt.data.scores.scores import Scores, open_scores
from megacpt.data.subset.selection import ORDERS, Ranking, rank_at_random, rank_by_score, shortest_prefix
from megacpt.data.subset.subset import SubsetManifest, sha256_of_ids, write_subset
from megacpt.data.tokens.indexed import IndexedDataset, bin_path, idx_path, write_index
from megacpt.data.tokens.manifest import Manifest, dataset_files, manifest_path, read_manifest, write_manifest
from megacpt.errors import UserError
from megacpt.files import atomic_write, json_beside, keep_apart, sha256_of

TOKENS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class SelectJob:
    """A whole run.

    Attributes:
        materialize: the prefix of a copy of the documents, in the order of their rank.
        eval_sets: files that the scorer's reference should not overlap.
        plot: where the caller will draw the scores, apart from all other files.
    """

    data: str
    tokens: int
    order: str
    output: Path
    scores: Path | None = None
    drop_tail: float = 0.0
    seed: int = 1234
    materialize: str | None = None
    eval_sets: tuple[Path, ...] = ()
    overwrite: bool = False
    plot: Path | None = None


@dataclass(frozen=True)
class Selected:
    """What was selected, the scores that were given, and what a user should hear."""

    manifest: SubsetManifest
    scores: Scores | None
    warnings: list[str]


def select(job: SelectJob) -> Selected:
    """Select a subset; write `job.output`, its manifest, and the copy if one is wanted.

    Raises:
        UserError: anything about the dataset, the scores, the budget or the output that the user can put right.
    """
    _check(job)
    dataset, made = IndexedDataset(job.data), read_manifest(job.data)
    scores = open_scores(job.scores, dataset, made) if job.scores is not None else None
    if job.order == "random":
        ranking = rank_at_random(dataset.lengths, job.seed)
    else:
        assert scores is not None
        ranking = rank_by_score(dataset.lengths, scores.values, job.order, job.drop_tail)
    ids = _within_budget(job, dataset, ranking)
    manifest = _described(job, dataset, ranking, ids, scores)
    if job.materialize is not None:
        _copy(job.materialize, dataset, ids, made)
    write_subset(job.output, ids, manifest)
    return Selected(manifest, scores, [*_worst_first(job, scores), *overlap_warnings(scores, job.eval_sets)])


def _worst_first(job: SelectJob, scores: Scores | None) -> list[str]:
    """What to tell of an order that begins with the documents that the scorer likes least."""
    best = {"lowest": "lower_is_better", "highest": "higher_is_better"}.get(job.order)
    if scores is None or best is None or scores.manifest.direction == best:
        return []
    name, direction = scores.manifest.scorer["name"], scores.manifest.direction.replace("_", " ")
    return [f"--order {job.order} takes the worst documents first: of these scores, {name}'s, {direction}"]


def _check(job: SelectJob) -> None:
    if job.order not in ORDERS:
        raise UserError(f"--order {job.order}: unknown; choose one of {', '.join(ORDERS)}")
    if job.order != "random" and job.scores is None:
        raise UserError(f"--order {job.order} needs --scores; score the corpus with tools/score.py")
    if job.order == "random" and job.drop_tail:
        raise UserError("--drop-tail needs an order by score; drop it, or choose --order lowest or highest")
    if not 0 <= job.drop_tail < 1:
        raise UserError(f"--drop-tail {job.drop_tail:g}: leaves nothing; give a share below 100%")
    for path in job.eval_sets:
        if not path.is_file():
            raise UserError(f"{path}: no such evaluation set; check --eval-set")
    if job.tokens < 1:
        raise UserError("--tokens 0 selects nothing; give a budget such as 5B")
    outputs = [job.output, json_beside(job.output)]
    if job.materialize is not None:
        if Path(job.materialize).resolve() == Path(job.data).resolve():
            raise UserError(f"--materialize {job.materialize}: is the dataset itself; choose another prefix")
        outputs += dataset_files(job.materialize)
    keep_apart([*outputs, *([] if job.plot is None else [job.plot])], _read(job))
    existing = [str(path) for path in outputs if path.exists()]
    if existing and not job.overwrite:
        raise UserError(f"{', '.join(existing)}: exists already; pass --overwrite or choose another name")


def _read(job: SelectJob) -> list[Path]:
    scores = [] if job.scores is None else [job.scores, json_beside(job.scores)]
    return [*dataset_files(job.data), *scores, *job.eval_sets]


def _within_budget(job: SelectJob, dataset: IndexedDataset, ranking: Ranking) -> np.ndarray:
    lengths = dataset.lengths[ranking.documents]
    count, tokens = shortest_prefix(lengths, job.tokens)
    if tokens < job.tokens:
        left_out = [
            f"{number:,} {words}"
            for number, words in (
                (ranking.dropped_tail, "dropped as the tail"),
                (ranking.unscored, "without a score"),
                (ranking.empty, "empty"),
            )
            if number
        ]
        rest = f" ({', '.join(left_out)})" if left_out else ""
        raise UserError(
            f"--tokens {job.tokens:,} is more than there is: {job.data} has {dataset.tokens:,} tokens in "
            f"{len(dataset):,} documents, of which {tokens:,} in {len(ranking.documents):,} can be selected{rest}; "
            "lower --tokens"
        )
    return ranking.documents[:count]


def _described(
    job: SelectJob, dataset: IndexedDataset, ranking: Ranking, ids: np.ndarray, scores: Scores | None
) -> SubsetManifest:
    ranked_by_score = scores is not None and job.order != "random"
    used: dict[str, Any] | None = None
    if scores is not None and ranked_by_score:
        assert job.scores is not None
        used = {
            "sha256": scores.manifest.sha256,
            "manifest_sha256": sha256_of(json_beside(job.scores)),
            "scorer": scores.manifest.scorer,
            "direction": scores.manifest.direction,
        }
    return SubsetManifest(
        documents=len(ids),
        tokens=int(dataset.lengths[ids].sum()),
        order=job.order,
        seed=job.seed if job.order == "random" else None,
        threshold=float(scores.values[ids[-1]]) if scores is not None and ranked_by_score else None,
        best=float(scores.values[ids[0]]) if scores is not None and ranked_by_score else None,
        dropped={
            "share": job.drop_tail,
            "tail": ranking.dropped_tail,
            "unscored": ranking.unscored,
            "empty": ranking.empty,
        },
        scores=used,
        dataset={"digest": dataset.digest(), "documents": len(dataset), "tokens": dataset.tokens},
        sha256=sha256_of_ids(ids),
        megacpt_version=__version__,
    )


def _copy(prefix: str, dataset: IndexedDataset, ids: np.ndarray, made: Manifest | None) -> None:
    """Write the documents as a dataset of their own; the `.bin` gets its name last."""
    lengths = dataset.lengths[ids].astype(np.int32)
    with ExitStack() as undo, atomic_write(bin_path(prefix)) as handle:
        for part in _batches(dataset, ids):
            handle.write(part)
        bin_path(prefix).unlink(missing_ok=True)
        for path in (idx_path(prefix), manifest_path(prefix)):
            undo.callback(path.unlink, missing_ok=True)
        write_index(prefix, dataset.dtype.newbyteorder("="), lengths)
        if made is not None:
            write_manifest(prefix, _manifest_of_part(made, lengths))
        undo.pop_all()


def _manifest_of_part(made: Manifest, lengths: np.ndarray) -> Manifest:
    """The manifest of some of a dataset's documents; no run over the inputs gives these alone."""
    return replace(
        made,
        documents=len(lengths),
        tokens=int(lengths.sum(dtype=np.int64)),
        empty_documents=0,
        eod_tokens=len(lengths) if made.append_eod else 0,
        text_bytes=None,
        filters=None,
        lengths=None,
        shard=None,
    )


def _batches(dataset: IndexedDataset, ids: np.ndarray) -> Iterator[bytes]:
    """Tokens of documents, about TOKENS_AT_ONCE at a time."""
    ends = np.cumsum(dataset.lengths[ids])
    cuts = np.searchsorted(ends, np.arange(0, int(ends[-1]) + TOKENS_AT_ONCE, TOKENS_AT_ONCE), side="left")
    for start, stop in pairwise(sorted({0, *cuts.tolist(), len(ids)})):
        yield np.concatenate([dataset.read(document) for document in ids[start:stop].tolist()]).tobytes()


def overlap_warnings(scores: Scores | None, eval_sets: Sequence[Path]) -> list[str]:
    """What a user should hear of evaluation sets that the scorer's reference holds, or was never compared with."""
    if scores is None:
        return []
    entries = [EvalOverlap(**entry) for entry in scores.manifest.scorer.get("overlap", [])]
    warnings = [f"the scorer's reference overlaps {entry.sentence()}" for entry in entries if entry.overlapping]
    checked = {entry.sha256 for entry in entries}
    unchecked = [path.name for path in eval_sets if sha256_of(path) not in checked]
    if unchecked:
        warnings.append(
            f"the scorer's reference was never compared with {', '.join(unchecked)}; run tools/overlap.py on the "
            "reference, or train the model with --eval-set"
        )
    return warnings
