"""Our trainer against the definition (probabilities sum to one) and against lmplz."""

import io
import subprocess
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.scores.kenlm_build import Programs, find_programs
from megacpt.data.scores.kneser_ney import BEGIN, EDGES, Estimate, discounts, estimate, read_corpus, write_arpa
from megacpt.data.scores.normalize import Normalization, normalizer
from megacpt.errors import UserError

SENTENCES = st.lists(
    st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), min_size=1, max_size=6), min_size=1, max_size=8
)


@pytest.fixture(scope="module")
def lmplz() -> Programs:
    found = find_programs()
    if found is None:
        pytest.skip(
            "lmplz is neither in KENLM_BIN, on PATH nor in the cache; tools/train_kenlm.py --trainer lmplz builds it"
        )
    return found


@pytest.fixture(scope="module")
def prose() -> list[bytes]:
    """Python's own documentation as sentences: 120,000 words of real English."""
    documents = normalizer(Normalization())([text for _, text in sorted(topics.items())])
    return [line for document in documents for line in document.lines]


def arpa(sentences: list[bytes], order: int) -> bytes:
    corpus, out = read_corpus(sentences), io.BytesIO()
    write_arpa(estimate(corpus, order), corpus.words, out)
    return out.getvalue()


def entries(text: bytes) -> dict[bytes, tuple[float, float]]:
    """n-gram -> (log10 probability, log10 back-off weight or 0)."""
    rows = [line.split(b"\t") for line in text.split(b"\n") if b"\t" in line]
    return {row[1]: (float(row[0]), float(row[2]) if len(row) > 2 else 0.0) for row in rows}


def probability(model: dict[bytes, tuple[float, float]], context: tuple[bytes, ...], word: bytes) -> float:
    """p(word | context), by the back-off that the ARPA format defines."""
    gram = b" ".join([*context, word])
    if gram in model:
        return 10 ** model[gram][0]
    weight = model.get(b" ".join(context), (0.0, 0.0))[1]
    return 10**weight * probability(model, context[1:], word)


@given(SENTENCES, st.integers(2, 4))
def test_what_follows_any_context_sums_to_one(sentences: list[list[bytes]], order: int) -> None:
    order = min(order, 2 + max(map(len, sentences)))
    model = entries(arpa([b" ".join(words) for words in sentences], order))
    words = [gram for gram in model if b" " not in gram and gram != EDGES[BEGIN]]
    contexts = {tuple(gram.split()) for gram in model if len(gram.split()) < order and not gram.endswith(b"</s>")}
    for context in [(), *contexts]:
        assert sum(probability(model, context, word) for word in words) == pytest.approx(1, abs=1e-6)


def run_lmplz(programs: Programs, folder: Path, sentences: list[bytes], order: int) -> bytes:
    (folder / "text").write_bytes(b"".join(line + b"\n" for line in sentences))
    command = [programs.lmplz, "-o", str(order), "-S", "200M", "-T", f"{folder}/", "--skip_symbols"]
    command += ["--discount_fallback", "0.5", "1", "1.5"]
    with open(folder / "text", "rb") as text:
        return subprocess.run(command, stdin=text, capture_output=True, check=True).stdout


@pytest.mark.parametrize(("order", "lines"), [(2, 300), (3, None), (5, None), (5, 40), (6, 300)])
def test_the_model_is_that_of_lmplz(
    lmplz: Programs, tmp_path: Path, prose: list[bytes], order: int, lines: int | None
) -> None:
    sentences = prose[:lines]
    ours, theirs = entries(arpa(sentences, order)), entries(run_lmplz(lmplz, tmp_path, sentences, order))
    assert ours.keys() == theirs.keys()
    assert len(ours) > 500
    difference = np.abs(np.array([ours[gram] for gram in ours]) - np.array([theirs[gram] for gram in ours]))
    # lmplz computes in float32 and prints seven digits.
    assert difference.max() < 1e-5


def test_kenlm_reads_what_is_written(tmp_path: Path, prose: list[bytes]) -> None:
    kenlm = pytest.importorskip("kenlm")
    text = arpa(prose[:500], 4)
    (tmp_path / "model.arpa").write_bytes(text)
    model, known = kenlm.Model(str(tmp_path / "model.arpa")), entries(text)
    sentence = prose[3].split()
    expected, context = 0.0, (b"<s>",)
    for word in [*sentence, b"</s>"]:
        expected += np.log10(probability(known, context, word))
        context = (*context, word)[-3:]
    assert model.score(b" ".join(sentence)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("counts", "table", "computed"),
    [
        ([1] * 4 + [2] * 2 + [3], [0, 0.5, 1.25, 3.0], True),  # n1 4, n2 2, n3 1, n4 0: y = 1/2
        ([1, 1, 1], [0, 0.5, 1.0, 1.5], False),
        ([1] * 10 + [2, 3] + [4] * 5, [0, 0.5, 1.0, 1.5], False),  # a negative discount
    ],
)
def test_discounts(counts: list[int], table: list[float], computed: bool) -> None:
    found, from_counts = discounts(np.array(counts))
    assert found.tolist() == pytest.approx(table)
    assert from_counts == computed


def test_too_large_and_empty_references_are_refused() -> None:
    with pytest.raises(UserError, match="more than 3 words, the most that the trainer in Python takes"):
        read_corpus([b"a b", b"c d"], largest=3)
    with pytest.raises(UserError, match="holds no word"):
        estimate(read_corpus([]), 3)
    with pytest.raises(UserError, match="long enough for 4-grams; lower --order"):
        estimate(read_corpus([b"a"]), 4)


def test_orders_that_fall_back_are_named() -> None:
    model: Estimate = estimate(read_corpus([b"a b a b"]), 2)
    assert model.fallback_orders == [1, 2]
