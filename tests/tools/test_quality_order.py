"""On real text a model of textbooks and question-answer pages puts documents in the order in which a person would."""

import gzip
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

REFERENCE = {"medical/openstax_nursing": 480, "medical/medquad": 6000, "medical/rct_fulltext": 120}
HELD_OUT = [*REFERENCE, "general/wikipedia_wikitext2", "general/books"]
EACH = 60
LONGEST = 20_000


def texts(shared: Path, name: str) -> Iterator[str]:
    with gzip.open(shared / "data" / f"{name}.jsonl.gz") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def shuffled(text: str) -> str:
    words = [line.split() for line in text.split("\n")]
    flat = [word for line in words for word in line]
    random.Random(0).shuffle(flat)
    order = iter(flat)
    return "\n".join(" ".join(islice(order, len(line))) for line in words)


def write(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture(scope="module")
def medians(shared: Path, tmp_path_factory: pytest.TempPathFactory, load_tool) -> dict[str, float]:
    """Median perplexity of held-out documents per kind; even documents train, odd ones are held out."""
    pytest.importorskip("kenlm")
    folder = tmp_path_factory.mktemp("quality")
    reference = [
        text for name, documents in REFERENCE.items() for text in list(islice(texts(shared, name), documents))[::2]
    ]
    train = [
        "--input",
        write(folder / "reference.jsonl", reference),
        "--output",
        folder / "model",
        "--trainer",
        "python",
    ]
    assert load_tool("train_kenlm").main([str(part) for part in train]) == 0
    kinds = {name: list(islice(texts(shared, name), 2 * EACH))[1::2] for name in HELD_OUT}
    kinds["shuffled trials"] = [shuffled(text) for text in kinds["medical/rct_fulltext"]]
    found = {}
    for name, documents in kinds.items():
        corpus = write(folder / "corpus.jsonl", [text[:LONGEST] for text in documents])
        score = ["--input", corpus, "--model", folder / "model", "--output", folder / "scores", "--overwrite"]
        assert load_tool("score").main([str(part) for part in score]) == 0
        found[name] = float(np.median(np.fromfile(folder / "scores", dtype="<f4")))
    return found


def test_the_order_of_medians(medians: dict[str, float]) -> None:
    print(medians)
    textbooks, pages = medians["medical/openstax_nursing"], medians["medical/medquad"]
    trials, shuffled_trials = medians["medical/rct_fulltext"], medians["shuffled trials"]
    prose = min(medians["general/wikipedia_wikitext2"], medians["general/books"])
    assert max(textbooks, pages) < trials < prose
    assert trials < shuffled_trials
