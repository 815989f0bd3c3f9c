"""Means, intervals and paired differences, against arithmetic done by hand and against the normal approximation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.eval.statistics import Measure, difference, estimate


def measure(values: list[float], name: str = "task/acc", **options: str) -> Measure:
    array = np.array(values, dtype=np.float64)
    return Measure(name, tuple(f"item{i}" for i in range(len(values))), array, np.ones(len(values)), **options)


def items(values: list[float]) -> dict[str, tuple[float, float]]:
    return {f"item{i}": (value, 1.0) for i, value in enumerate(values)}


def test_the_interval_of_a_share_is_the_binomial_one() -> None:
    found = estimate([measure([1.0] * 300 + [0.0] * 700)])
    assert found.value == 0.3
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert found.low == pytest.approx(0.3 - half, abs=0.004)
    assert found.high == pytest.approx(0.3 + half, abs=0.004)
    assert found == estimate([measure([1.0] * 300 + [0.0] * 700)])


def test_a_mean_of_tasks_is_unweighted_and_groups_count_once() -> None:
    a, b, c = measure([1.0] * 10, "a"), measure([0.0, 1.0], "b"), measure([0.0] * 4, "c")
    assert estimate([a, b]).value == 0.75
    assert estimate([a, [b, c]]).value == 0.625


def test_perplexity_is_of_sums_not_a_mean_of_perplexities() -> None:
    logprobs, words = np.array([-2.0, -30.0]), np.array([1.0, 9.0])
    found = Measure("wiki", ("x", "y"), logprobs, words, "perplexity")
    assert found.value == pytest.approx(math.exp(3.2))
    assert Measure("wiki", ("x", "y"), logprobs, words, "bits").value == pytest.approx(3.2 / math.log(2))


def test_pairing_sees_a_drop_that_unpaired_intervals_hide() -> None:
    before = [1.0] * 500 + [0.0] * 500
    now = [0.0] * 20 + before[20:]
    base = {"task/acc": items(before)}
    found = difference([measure(now)], base)
    assert found is not None
    delta, count = found
    assert count == 1000
    assert delta.value == pytest.approx(-0.02)
    assert delta.high is not None
    assert delta.high < 0
    assert delta.excludes_zero
    unpaired = estimate([measure(now)])
    assert unpaired.high is not None
    assert unpaired.high > 0.5


def test_no_difference_is_none_and_only_shared_items_count() -> None:
    same = difference([measure([1.0, 0.0, 1.0])], {"task/acc": items([1.0, 0.0, 1.0])})
    assert same is not None
    assert (same[0].value, same[0].low, same[0].high) == (0, 0, 0)
    assert not same[0].excludes_zero
    fewer = difference([measure([1.0, 0.0, 1.0])], {"task/acc": items([0.0])})
    assert fewer is not None
    assert (fewer[0].value, fewer[0].low, fewer[1]) == (1.0, None, 1)
    assert not fewer[0].excludes_zero
    assert difference([measure([1.0])], {"other/acc": items([1.0])}) is None
    assert difference([measure([1.0])], {"task/acc": {"elsewhere": (1.0, 1.0)}}) is None


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40))
def test_a_difference_turns_its_sign_with_its_sides(pairs: list[tuple[int, int]]) -> None:
    now, before = ([float(pair[side]) for pair in pairs] for side in (0, 1))
    forth = difference([measure(now)], {"task/acc": items(before)})
    back = difference([measure(before)], {"task/acc": items(now)})
    assert forth is not None
    assert back is not None
    assert forth[0].value == pytest.approx(-back[0].value)
    assert forth[0].low is not None
    assert back[0].high is not None
    assert forth[0].low == pytest.approx(-back[0].high)
    assert forth[0].low <= forth[0].value + 1e-9
