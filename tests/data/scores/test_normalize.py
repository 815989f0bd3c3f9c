"""The block-wise normaliser against CCNet's steps written out one character at a time."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.scores import normalize
from megacpt.data.scores.normalize import (
    ASCII_FORM,
    MARKS,
    PUNCTUATION,
    Normalization,
    normalization_from,
    normalizer,
    spelled_normalization,
)
from megacpt.data.text.long_string import Parts

RULES = st.builds(Normalization, st.booleans(), st.booleans(), st.booleans(), st.sampled_from(PUNCTUATION))
INTERESTING = "aBZ09 \t\n\r\0\x1f\x7f\x85éÉßİΣ٣１½…—’»  \u2028🙂漢각<s>/unk"
TEXTS = st.text(st.one_of(st.sampled_from(INTERESTING), st.characters(exclude_categories=["Cs"])), max_size=40)


def step_by_step(text: str, rules: Normalization) -> list[list[bytes]]:
    """Sentences as lists of words."""
    sentences = []
    for line in text.split("\n"):
        out = []
        for character in line:
            lower = character.lower() if rules.lowercase else character
            for part in unicodedata.normalize("NFD", lower) if rules.strip_accents else lower:
                category = unicodedata.category(part)
                if rules.strip_accents and category == "Mn":
                    continue
                if rules.digits_to_zero and category == "Nd":
                    out.append("0")
                elif part in ASCII_FORM and rules.punctuation != "keep":
                    out.append(ASCII_FORM[part] if rules.punctuation == "map" else "")
                elif part.isspace():
                    out.append(" ")
                elif category != "Cc":
                    out.append(part)
        words = [word for word in "".join(out).encode().split(b" ") if word and word not in MARKS]
        if words:
            sentences.append(words)
    return sentences


@given(st.lists(TEXTS, max_size=6), RULES)
def test_blocks_are_normalised_as_characters_are(texts: list[str], rules: Normalization) -> None:
    found = normalizer(rules)(texts)
    assert [[line.split() for line in document.lines] for document in found] == [step_by_step(t, rules) for t in texts]
    assert [document.words for document in found] == [sum(map(len, step_by_step(t, rules))) for t in texts]


@given(st.lists(TEXTS | st.just("<s> p<unk> \n <unk> " * 4), max_size=3), RULES, st.integers(1, 12))
def test_long_documents_are_normalised_as_short_ones(texts: list[str], rules: Normalization, long: int) -> None:
    expected = normalizer(rules)(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalize, "LONG", long)
        assert normalizer(rules)(texts) == expected
        assert normalizer(rules)([Parts(len(text), len(text.encode()), tuple(text)) for text in texts]) == expected


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("Aspirin 325\tmg", ["aspirin 000 mg"]),
        ("Crème brûlée — “naïve”…", ['creme brulee  -  "naive"...']),
        ("one\n\n  \ntwo\r\n", ["one", "two "]),
        ("p<s> <s> </s> <unk> <UNK> x", ["p<s>     x"]),
        ("zero\x00width\x07", ["zerowidth"]),
        ("", []),
        (" \n\x01", []),
    ],
)
def test_the_defaults(text: str, lines: list[str]) -> None:
    (document,) = normalizer(Normalization())([text])
    assert [line.decode() for line in document.lines] == lines


@given(RULES)
def test_rules_are_written_and_read(rules: Normalization) -> None:
    assert normalization_from(rules.as_dict()) == rules
    assert spelled_normalization(rules.spelled()) == rules


def test_ccnet_is_the_default() -> None:
    assert spelled_normalization("ccnet") == Normalization()


@pytest.mark.parametrize("text", ["lower", "punctuation=drop", "ccnet,lowercase"])
def test_unknown_steps(text: str) -> None:
    with pytest.raises(ValueError, match=r"choose one of|is not one of"):
        spelled_normalization(text)


@pytest.mark.parametrize("values", [None, {}, {"lowercase": True}, {**Normalization().as_dict(), "lowercase": 1}])
def test_no_rules(values: object) -> None:
    with pytest.raises(ValueError, match="not a normalisation"):
        normalization_from(values)
