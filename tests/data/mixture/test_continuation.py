import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.mixture.continuation import continuation, differences, start_of
from megacpt.data.mixture.mixture import Budget, Mixture, Source, Start
from megacpt.data.mixture.solve import solve
from megacpt.errors import UserError

MEDICAL = Source("medical", documents=10, tokens=1001, digest="aa", epochs=2)
GENERAL = Source("general", documents=20, tokens=5001, digest="bb", weight=0.18)
CODE = Source("code", documents=5, tokens=301, digest="cc", weight=0.1)


def fingerprint(*sources: Source, seq_length: int = 10, seed: int = 1, start: Start | None = None) -> dict[str, Any]:
    """As it comes back from a checkpoint."""
    mixture = solve(sources, seq_length, 8, seed, Budget(train_iters=2), start)
    return json.loads(json.dumps(mixture.fingerprint(), sort_keys=True))


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (fingerprint(GENERAL, MEDICAL), []),
        (fingerprint(MEDICAL, replace(GENERAL, weight=0.25)), ["source 'general': weight 0.18 -> weight 0.25"]),
        (fingerprint(replace(MEDICAL, epochs=3), GENERAL), ["source 'medical': epochs 2 -> epochs 3"]),
        (fingerprint(MEDICAL, replace(GENERAL, epochs=1, weight=None)), ["source 'general': weight 0.18 -> epochs 1"]),
        (fingerprint(MEDICAL), ["source 'general': removed"]),
        (fingerprint(MEDICAL, GENERAL, CODE), ["source 'code': added with weight 0.1"]),
        (fingerprint(MEDICAL, GENERAL, seq_length=20, seed=2), ["seq_length 10 -> 20", "seed 1 -> 2"]),
        (
            fingerprint(MEDICAL, replace(GENERAL, tokens=6001)),
            ["source 'general': 20 documents with 5,001 tokens -> 20 documents with 6,001 tokens"],
        ),
        (
            fingerprint(replace(MEDICAL, digest="zz"), GENERAL),
            ["source 'medical': its content changed"],
        ),
        (fingerprint(MEDICAL, GENERAL, start=Start(8, {"medical": 8})), ["the mixture begins at sample 0 -> 8"]),
    ],
)
def test_differences_are_named(new: dict[str, Any], expected: list[str]):
    assert differences(fingerprint(MEDICAL, GENERAL), new) == expected


def changed(mixture: Mixture, sources: list[Source], sample: int) -> Mixture:
    """What a run does that resumes at `sample` with other sources."""
    old = mixture.fingerprint()
    new = solve(sources, 10, 8, 1, start=start_of(old)).fingerprint()
    return solve(sources, 10, 8, 1, start=continuation(old, new, mixture.at(sample)))


def taken(mixture: Mixture, start: int, stop: int) -> list[tuple[str, int]]:
    """The samples of a stretch of the run as (source, sample of the source)."""
    located = (mixture.locate(k) for k in range(start, stop))
    sizes = [draw.size for draw in mixture.segments[0].draws]
    return [(mixture.sources[source].name, number * sizes[source] + row) for source, number, row in located]


@given(st.integers(1, 24), st.integers(1, 12), st.sampled_from([0.0, 0.05, 0.3, 0.6]), st.integers(2, 5))
def test_changing_the_mixture_twice_loses_and_repeats_nothing(one: int, two: int, weight: float, epochs: int):
    """Each source's samples come in order without a gap, and the epochs asked for last are exact."""
    first = solve([MEDICAL, GENERAL], 10, 8, 1)
    second = changed(first, [replace(MEDICAL, epochs=epochs), CODE], 8 * one)
    third = changed(second, [replace(GENERAL, weight=weight), replace(MEDICAL, epochs=5)], 8 * (one + two))
    begin, middle, end = third.start.sample, second.start.sample, third.start.sample + third.samples
    seen = taken(first, 0, middle) + taken(second, middle, begin) + taken(third, begin, end)
    for name in ("medical", "general", "code"):
        indices = [j for source, j in seen if source == name]
        assert indices == list(range(len(indices)))
    assert sum(name == "medical" for name, _ in seen) == 500


def test_a_finished_run_goes_on_after_its_fill():
    first = solve([MEDICAL, GENERAL], 10, 8, 1)
    end = first.steps * 8
    assert end > first.samples
    second = changed(first, [replace(MEDICAL, epochs=3), GENERAL], end)
    seen = taken(first, 0, end) + taken(second, end, end + second.samples)
    assert [j for name, j in seen if name == "medical"] == list(range(300))


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (fingerprint(MEDICAL, GENERAL, seq_length=20), "seq_length 10 -> 20"),
        (fingerprint(MEDICAL, GENERAL, seed=2), "seed 1 -> 2"),
        (fingerprint(MEDICAL, replace(GENERAL, documents=21)), "'general': 20 documents .* under another name"),
    ],
)
def test_changes_that_reshuffle_what_is_under_way_are_refused(new: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        continuation(fingerprint(MEDICAL, GENERAL), new, Start(80, {"medical": 66, "general": 14}))


def test_a_corpus_may_change_before_its_first_sample():
    old, new = fingerprint(MEDICAL, GENERAL), fingerprint(MEDICAL, replace(GENERAL, documents=21))
    at = Start(80, {"medical": 80, "general": 0})
    assert continuation(old, new, at) == at
