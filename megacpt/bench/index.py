"""How long it takes until a run can read its first sample, and any sample; beside megatron-core's index."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from megacpt.bench.rows import OURS, Recorder
from megacpt.data.mixture.mixture import Course, Passes, Source
from megacpt.data.mixture.solve import solve
from megacpt.data.samples.blended import BlendedDataset, Corpus, for_all
from megacpt.data.tokens.indexed import bin_path, idx_path, write_index
from megacpt.files import make_folder

SEQ_LENGTH = 8192
MEAN_LENGTH = 1000
VOCABULARY = 60_000


def make_corpora(folder: Path, sources: int, documents: int) -> list[str]:
    """Prefixes of `sources` datasets with `documents` in all; their tokens are holes in sparse files."""
    random_lengths, prefixes = np.random.default_rng(0), []
    make_folder(folder)
    for number in range(sources):
        prefix = folder / f"s{number:03d}"
        prefixes.append(str(prefix))
        if idx_path(prefix).is_file():
            continue
        lengths = random_lengths.integers(1, 2 * MEAN_LENGTH, documents // sources).astype(np.int32)
        with open(bin_path(prefix), "wb") as handle:
            handle.truncate(int(lengths.sum(dtype=np.int64)) * 2)
        write_index(prefix, np.dtype(np.uint16), lengths)
    return prefixes


def first_batch(prefixes: list[str]) -> dict[str, float]:
    """Open, check, solve, shuffle, read.

    Returns:
        Seconds until every sample of a pass can be found (`ready`) and until the first batch of 1,024 samples is read
        (`first`), and microseconds to find any sample (`sample`).
    """
    began = time.perf_counter()
    corpora = dict(zip(prefixes, for_all(Corpus.open, prefixes), strict=True))
    sources = [Source(name, len(c), c.tokens, c.digest, weight=1.0) for name, c in corpora.items()]
    per_pass = sum(corpus.tokens for corpus in corpora.values()) // SEQ_LENGTH // 5 * 4
    mixture = solve(sources, SEQ_LENGTH, 1024, 1234, course=Course(Passes(per_pass, 4)))
    blend = BlendedDataset(mixture, corpora, VOCABULARY)
    blend.prepare(0)
    ready = time.perf_counter() - began
    for k in range(1024):
        blend.sample(k)
    seconds = time.perf_counter() - began
    chosen = random.Random(0).sample(range(per_pass), 5000)
    began = time.perf_counter()
    for k in chosen:
        source, number, row = mixture.locate(k)
        blend.streams[source].order(number).pieces(row * SEQ_LENGTH, row * SEQ_LENGTH + SEQ_LENGTH + 1)
    return {"ready": ready, "first": seconds, "sample": (time.perf_counter() - began) / len(chosen) * 1e6}


def measure(recorder: Recorder, folder: Path, documents: int, sources: int) -> None:
    """Rows on the first batch, in a process of its own so that its memory is its own."""
    prefixes = make_corpora(folder / f"{documents}_{sources}", sources, documents)
    case = f"{documents / 1e6:g}M documents, {sources} sources, 4 passes"
    code = (
        "import sys, json, resource\nfrom megacpt.bench.index import first_batch\n"
        "r = first_batch(sys.argv[1:])\nr['rss'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3\n"
        "r['torch'] = 'torch' in sys.modules\nprint(json.dumps(r))"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *prefixes], capture_output=True, text=True, check=True)
    wall = time.perf_counter() - began
    found = json.loads(done.stdout)
    recorder.add("index", case, OURS, found["ready"], "s", "indices opened and checked, one pass shuffled")
    recorder.add("index", case, OURS, found["first"], "s to first batch", "1,024 samples of 8,192 tokens read as well")
    recorder.add("index", case, OURS, wall, "s wall", "all of it, with the interpreter's start")
    recorder.add("index", case, OURS, found["rss"], "MB resident", "the whole process, mapped lengths included")
    recorder.add("index", case, OURS, found["sample"], "us/sample", "which tokens sample k is, k at random")
    _megatron(recorder, case, prefixes, documents)


def _megatron(recorder: Recorder, case: str, prefixes: list[str], documents: int) -> None:
    """megatron-core's index of the same documents for one pass: document, sample and shuffle indices."""
    try:
        from megatron.core.datasets import gpt_dataset, helpers
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    except ImportError:
        return
    began = time.perf_counter()
    kept = 0
    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        sizes = np.asarray(dataset.sequence_lengths)
        order = gpt_dataset._build_document_index(
            np.arange(len(sizes), dtype=np.int32), 1, np.random.RandomState(1), False
        )
        tokens = int(sizes.sum(dtype=np.int64))
        index = helpers.build_sample_idx(sizes, order, SEQ_LENGTH, 1, tokens)
        shuffle = gpt_dataset._build_shuffle_index(len(index) - 1, len(index) - 1, np.random.RandomState(1))
        kept += order.nbytes + index.nbytes + shuffle.nbytes
    seconds = time.perf_counter() - began
    recorder.add("index", case, "megatron-core", seconds, "s", "indices opened, one pass indexed, not blended or saved")
    recorder.add("index", case, "megatron-core", kept / 1e6, "MB on disk", "index files of one pass")
    recorder.add("index", case, OURS, 0, "MB on disk")
