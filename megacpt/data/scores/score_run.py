"""A corpus to a file of scores: read in order, scored in N processes or on Ray, written in order, resumable."""

import errno
import hashlib
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacpt import __version__
from megacpt.data.scores.corpora import Corpus
from megacpt.data.scores.score_work import ScoreWork
from megacpt.data.scores.scores import ScoresManifest, write_scores
from megacpt.data.scores.scoring import BlockTask, Scored, ScorerSpec, Task, run_task
from megacpt.data.text.filtering import DUPLICATES, DigestSet
from megacpt.data.text.rows import WrongRow
from megacpt.data.tokens.pool import Run, pool
from megacpt.data.tokens.processes import WorkerLost
from megacpt.data.tokens.progress import Progress, Totals
from megacpt.errors import UserError
from megacpt.files import json_beside


@dataclass(frozen=True)
class ScorerRecord:
    """What a manifest says of a scorer: see `scores.ScoresManifest`."""

    scorer: dict[str, Any]
    direction: str


@dataclass(frozen=True)
class ScoreJob:
    """A whole run. `workers` are processes, on Ray tasks at a time."""

    output: Path
    spec: ScorerSpec
    record: ScorerRecord
    workers: int = 1
    engine: str = "local"
    overwrite: bool = False


class _Report(Progress):
    """Progress in documents."""

    def speed(self, done: Totals) -> str:
        """Documents and MB of text per second since the start."""
        seconds = max(1e-9, time.monotonic() - self.started)
        return f"{done.documents:,} documents, {done.documents / seconds:,.0f}/s, {done.text / 1e6 / seconds:.2f} MB/s"


def score(job: ScoreJob, corpus: Corpus) -> ScoresManifest:
    """Score a corpus; write `job.output` and its manifest.

    Raises:
        UserError: anything about the corpus, the scorer or the output that the user can put right.
    """
    if job.workers < 1:
        raise UserError(f"--workers {job.workers}: there must be at least one")
    if not job.overwrite and (job.output.exists() or json_beside(job.output).exists()):
        raise UserError(f"{job.output}: exists already; pass --overwrite or choose another --output")
    # Processes of its own start before the work folder is locked.
    with pool(run_task, job.workers, job.engine) as run:
        work = ScoreWork(job.output, {"corpus": corpus.identity(), **asdict(job.record), "version": __version__})
        try:
            _run(job, corpus, work, run)
            manifest = _finish(job, corpus, work)
        except UserError as error:
            # A wrong row has to change, and then the scores so far are another job's.
            work.leave() if _passes(error) else work.remove()
            raise
        except BaseException:
            work.leave()
            raise
        work.remove()
    return manifest


def _passes(error: UserError) -> bool:
    """Whether the same command may well succeed another time."""
    cause = error.__cause__
    full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or isinstance(error, WorkerLost)


def _run(job: ScoreJob, corpus: Corpus, work: ScoreWork, run: Run[Task, Scored]) -> None:
    seen = DigestSet() if corpus.filters is not None and corpus.filters.dedup == "exact" else None
    done = work.done
    totals = Totals()
    under_way: deque[Task] = deque()

    def wanted() -> Iterator[Task]:
        for task, consumed in corpus.tasks(job.spec, done):
            if task is None:
                totals.consumed += consumed
            else:
                under_way.append(task)
                # Another machine may not see the files.
                yield task.loaded() if job.engine == "ray" else task

    first = 0 if seen else done
    with closing(_Report(corpus.size)) as progress, closing(run(wanted())) as results, _wrong_rows_named(under_way):
        for number, result in enumerate(results, start=first):
            under_way.popleft()
            scores, dropped = result.scores, result.dropped
            if seen is not None:
                assert result.digests is not None
                new = seen.add(result.digests)
                scores = scores[new] if number >= done else scores
                dropped[DUPLICATES] += int((~new).sum())
            if number >= done:
                work.append(scores, +dropped)
            totals.documents += len(scores)
            totals.consumed += result.consumed
            totals.text += result.text
            progress.update(totals)


@contextmanager
def _wrong_rows_named(under_way: deque[Task]) -> Iterator[None]:
    """Name a bad row by its line: the first task that has no result yet holds it."""
    try:
        yield
    except WrongRow as error:
        task = under_way[0]
        assert isinstance(task, BlockTask)
        raise error.named(task.block) from error


def _finish(job: ScoreJob, corpus: Corpus, work: ScoreWork) -> ScoresManifest:
    values = work.values()
    if not len(values):
        raise UserError("the corpus holds no document to score; check --input and its filters")
    manifest = ScoresManifest(
        documents=len(values),
        unscored=int(np.isinf(values).sum()),
        scorer=job.record.scorer,
        direction=job.record.direction,
        dropped=dict(sorted(work.dropped.items())),
        sha256=hashlib.sha256(values.tobytes()).hexdigest(),
        megacpt_version=__version__,
        **corpus.described(),
    )
    write_scores(job.output, values, manifest)
    return manifest
