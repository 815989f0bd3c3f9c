"""Documents scored by KenLM: ours, normalisation included, beside the library's queries on text made ready."""

import time
from itertools import batched
from pathlib import Path

from megacpt.bench.rows import OURS, Recorder
from megacpt.data.scores.kenlm_build import import_kenlm
from megacpt.data.scores.kenlm_model import PerplexityScorer, check_model
from megacpt.data.scores.normalize import normalizer
from megacpt.data.text.filtering import iter_documents
from megacpt.data.text.provenance import Filters

BATCH = 64


def measure(recorder: Recorder, text: Path, model: Path, megabytes: float) -> None:
    """Rows on the first megabytes of a text file, in memory, on one core."""
    normalization, _, _ = check_model(model)
    texts: list[str] = []
    size = 0
    for _, (document,) in iter_documents([text], ["text"], Filters()):
        texts.append(document)
        size += len(document.encode())
        if size > megabytes * 1e6:
            break
    case = f"{text.name} {size / 1e6:.0f} MB, {model.name}"
    scorer = PerplexityScorer(model, normalization)
    scorer.score(texts[:BATCH])
    began = time.perf_counter()
    for batch in batched(texts, BATCH):
        scorer.score(batch)
    recorder.add("scoring", case, OURS, size / 1e6 / (time.perf_counter() - began), "MB/s", "normalisation included")
    normalized = normalizer(normalization)(texts)
    raw = import_kenlm().Model(str(model))
    began = time.perf_counter()
    for sentences in normalized:
        for line in sentences.lines:
            raw.score(line)
    recorder.add(
        "scoring", case, "kenlm.Model.score", size / 1e6 / (time.perf_counter() - began), "MB/s", "lines ready"
    )
