"""Hashed n-grams, and weights that tell two kinds of text apart."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.scores import dsir
from megacpt.data.scores.dsir import BUCKETS, Buckets, DsirScorer, bucket_counts, fit
from megacpt.data.text.long_string import Parts

TARGET = ["the patient was given aspirin for pain"] * 5
RAW = ["def f(x): return x + 1", "class A: pass", "the patient list"] * 5


def of(text: str) -> list[int]:
    return np.concatenate(list(Buckets().of(text))).tolist()


def test_buckets_are_unigrams_then_bigrams() -> None:
    a, b, ab = of("Aspirin helps")
    assert of("aspirin") == [a]
    assert of("helps  ASPIRIN")[:2] == [b, a]
    assert of("helps aspirin")[2] != ab
    assert [a, b, ab] == [7497, 565, 489], "buckets do not change from release to release"
    assert of(" \n") == []
    assert len(of("p<0.05")) == 2 * 5 - 1


@given(st.text("ab< \n", max_size=40), st.integers(1, 9))
def test_a_long_text_has_the_buckets_of_the_whole(text: str, long: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsir, "LONG", long)
        in_pieces = of(text)
    assert sorted(in_pieces) == sorted(of(text)) == sorted(of(Parts(len(text), len(text), tuple(text))))


def test_weights_are_log_ratios_of_smoothed_frequencies() -> None:
    target, raw = bucket_counts(TARGET), bucket_counts(RAW)
    assert target.sum() == 5 * 13
    scorer = DsirScorer(fit(target, raw))
    (bucket,) = of("aspirin")
    expected = math.log((target[bucket] + 1) / (target.sum() + BUCKETS) / (raw[bucket] + 1) * (raw.sum() + BUCKETS))
    assert scorer.score(["aspirin"])[0] == pytest.approx(expected, rel=1e-6)
    like, unlike, empty = scorer.score(["the patient was given aspirin", "def f(x): pass", ""])
    assert like > 0 > unlike
    assert empty == -np.inf


def test_length_normalisation_is_the_mean() -> None:
    target, raw = bucket_counts(TARGET), bucket_counts(RAW)
    text = "the patient was given x"
    (total,), (mean,) = (DsirScorer(fit(target, raw, normalized)).score([text]) for normalized in (False, True))
    assert total == pytest.approx(mean * 9, rel=1e-6)
    assert fit(target, raw, False).sha256 != fit(target, raw, True).sha256
