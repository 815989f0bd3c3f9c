"""Hashed n-grams, and weights that tell two kinds of text apart."""

import math

import numpy as np
import pytest

from megacpt.data.scores.dsir import BUCKETS, Buckets, DsirScorer, bucket_counts, fit

TARGET = ["the patient was given aspirin for pain"] * 5
RAW = ["def f(x): return x + 1", "class A: pass", "the patient list"] * 5


def test_buckets_are_unigrams_then_bigrams() -> None:
    buckets = Buckets()
    a, b, ab = buckets.of("Aspirin helps").tolist()
    assert buckets.of("aspirin").tolist() == [a]
    assert buckets.of("helps  ASPIRIN").tolist()[:2] == [b, a]
    assert buckets.of("helps aspirin").tolist()[2] != ab
    assert [a, b, ab] == [7497, 565, 489], "buckets do not change from release to release"
    assert buckets.of(" \n").tolist() == []
    assert len(buckets.of("p<0.05")) == 2 * 5 - 1


def test_weights_are_log_ratios_of_smoothed_frequencies() -> None:
    target, raw = bucket_counts(TARGET), bucket_counts(RAW)
    assert target.sum() == 5 * 13
    scorer = DsirScorer(fit(target, raw))
    (bucket,) = Buckets().of("aspirin").tolist()
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
