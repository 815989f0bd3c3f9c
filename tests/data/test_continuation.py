import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.continuation import continuation, differences, start_of
from megacpt.data.mixture import Budget, Source, Start
from megacpt.data.solve import solve
from megacpt.errors import UserError

MEDICAL = Source("medical", documents=10, tokens=1001, digest="aa", epochs=2)
GENERAL = Source("general", documents=20, tokens=5001, digest="bb", weight=0.18)
CODE = Source("code", documents=5, tokens=301, digest="cc", weight=0.1)


def fingerprint(*sources: Source, seq_length: int = 10, seed: int = 1, start: Start | None = None) -> dict[str, Any]:
    """As it comes back from a checkpoint."""
    mixture = solve(sources, seq_length, 8, seed, Budget(train_iters=1), start)
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
            ["source 'medical': the lengths of its documents changed"],
        ),
        (fingerprint(MEDICAL, GENERAL, start=Start(8, {"medical": 8})), ["the mixture begins at sample 0 -> 8"]),
    ],
)
def test_differences_are_named(new: dict[str, Any], expected: list[str]):
    assert differences(fingerprint(MEDICAL, GENERAL), new) == expected


@given(st.integers(0, 24), st.integers(0, 12), st.sampled_from([0.0, 0.05, 0.3, 0.6]), st.integers(2, 5))
def test_changing_the_mixture_twice_loses_and_repeats_nothing(first: int, second: int, weight: float, epochs: int):
    """Each source's samples come in order without a gap, and the epochs asked for last are exact."""
    plans = [
        [MEDICAL, GENERAL],
        [replace(MEDICAL, epochs=epochs), CODE],
        [replace(GENERAL, weight=weight), replace(MEDICAL, epochs=5)],
    ]
    begins, seen = [0, 8 * first, 8 * (first + second)], []
    mixture = solve(plans[0], 10, 8, 1)
    for plan, begin, end in zip(plans, begins, [*begins[1:], None], strict=True):
        if begin:
            old = mixture.fingerprint()
            candidate = solve(plan, 10, 8, 1, start=start_of(old)).fingerprint()
            mixture = solve(plan, 10, 8, 1, start=continuation(old, candidate, begin, mixture.consumed(begin)))
        located = [mixture.locate(k) for k in range(begin, mixture.stop if end is None else end)]
        seen += [(mixture.sources[source].name, j) for source, j in located]
    for name in ("medical", "general", "code"):
        indices = [j for source, j in seen if source == name]
        assert indices == list(range(len(indices)))
    assert sum(name == "medical" for name, _ in seen) == (500 if first + second else 200)


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
        continuation(fingerprint(MEDICAL, GENERAL), new, 80, {"medical": 66, "general": 14})


def test_a_corpus_may_change_before_its_first_sample():
    old, new = fingerprint(MEDICAL, GENERAL), fingerprint(MEDICAL, replace(GENERAL, documents=21))
    assert continuation(old, new, 80, {"medical": 80, "general": 0}) == Start(80, {"medical": 80, "general": 0})
