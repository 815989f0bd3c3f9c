"""How fast one process scores, beside KenLM's own query on the same text already normalised; both in one run.

    python tools/bench_scoring.py --input corpus.jsonl.gz --model model.binary

"a worker" is what each process of --workers N does: parse, normalise, query. "all in one process" is --workers 1, which
also reads, unpacks, hashes and writes. Times are CPU seconds of this process, so that a busy machine disturbs them
little; the three alternate, and the best of each counts.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from megacpt.data.corpora import TextFiles
from megacpt.data.documents import find_inputs
from megacpt.data.filtering import iter_documents
from megacpt.data.kenlm_build import import_kenlm
from megacpt.data.kenlm_model import check_model
from megacpt.data.manifest import Filters
from megacpt.data.normalize import normalizer
from megacpt.data.score_run import ScoreJob, score
from megacpt.data.scorers import kenlm_scorer
from megacpt.data.scoring import run_task
from megacpt.errors import UserError


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process that `work` takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(inputs: Sequence[str], key: str, model: Path, repeats: int) -> None:
    """Print the three rates."""
    normalization, _, _ = check_model(model)
    texts = [text for _, (text,) in iter_documents(find_inputs(inputs), [key], Filters())]
    documents = normalizer(normalization)(texts)
    count = len(texts)
    lines = [line.decode() for document in documents for line in document.lines]
    size, words = sum(len(text.encode()) for text in texts) / 1e6, sum(document.words for document in documents)
    del texts, documents
    query = import_kenlm().Model(str(model)).score
    spec, record = kenlm_scorer(model)
    tasks = [task for task, _ in TextFiles(tuple(inputs), (key,), Filters()).tasks(spec, 0) if task]
    seconds: dict[str, list[float]] = {"KenLM's query alone": [], "a worker": [], "all in one process": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats):
            job = ScoreJob(Path(folder) / str(number), spec, record)
            whole = partial(score, job, TextFiles(tuple(inputs), (key,), Filters()))
            each: tuple[Callable[[], object], ...] = (
                lambda: sum(map(query, lines)),
                lambda: [run_task(task) for task in tasks],
                whole,
            )
            for name, work in zip(seconds, each, strict=True):
                seconds[name].append(cpu_seconds(work))
    print(f"{count:,} documents, {size:.1f} MB, {len(lines):,} lines, {words:,} words; CPU time")
    raw = min(seconds["KenLM's query alone"])
    for name, found in seconds.items():
        best = min(found)
        rates = f"{size / best:.1f} MB/s, {words / best / 1e6:.2f} M words/s, {len(lines) / best:,.0f} lines/s"
        print(f"{name:20} {rates}, {raw / best:.2f} of the query's rate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when done, 2 on a user's mistake."""
    parser = argparse.ArgumentParser(description="How fast one process scores, beside KenLM's query alone.")
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--json-key", default="text")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    try:
        measure(options.input, options.json_key, options.model, options.repeats)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
