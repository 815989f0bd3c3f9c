import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megacpt.eval.seeds import difference, mean_interval, t_cdf, t_quantile

TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 10: 2.2281, 30: 2.0423, 120: 1.9799}


@pytest.mark.parametrize(("degrees", "quantile"), TABLE.items())
def test_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(quantile, abs=5e-5)


def test_one_and_two_degrees_have_closed_forms() -> None:
    for t in (0.0, 0.3, 1.0, 5.0):
        assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi)
        assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)))


def test_no_quantile_outside_its_range() -> None:
    for probability, degrees in ((0.4, 3), (1.0, 3), (0.9, 0)):
        with pytest.raises(ValueError, match="no quantile"):
            t_quantile(probability, degrees)


def test_paired_by_hand() -> None:
    told = difference({1: 0.5, 2: 0.6, 3: 0.7}, {3: 0.6, 1: 0.3, 2: 0.3})
    assert told.method == "paired t"
    assert told.mean == pytest.approx(0.2)
    # Differences 0.2, 0.3, 0.1: deviation 0.1, of the mean 0.1 / sqrt(3).
    assert told.high == pytest.approx(0.2 + 4.302653 * 0.1 / math.sqrt(3), abs=1e-6)
    assert told.significant is False


def test_pairing_takes_out_what_seeds_share() -> None:
    a, b = {1: 1.0, 2: 5.0, 3: 9.0}, {1: 0.9, 2: 4.89, 3: 8.91}
    assert difference(a, b).significant
    assert not difference(a, {seed + 10: value for seed, value in b.items()}).significant


def test_other_seeds_are_not_paired() -> None:
    told = difference({1: 1.0, 2: 1.2, 3: 1.1}, {4: 0.1, 5: 0.2})
    assert told.method == "Welch t"
    assert told.seeds == (3, 2)
    assert told.significant


def test_one_seed_has_no_interval() -> None:
    for b in ({1: 0.5}, {2: 0.5}):
        told = difference({1: 1.0}, b)
        assert (told.mean, told.low, told.high, told.method, told.significant) == (0.5, None, None, "one seed", None)
    assert mean_interval([3.0]) == (3.0, None, None)


def test_equal_differences_have_an_interval_of_no_width() -> None:
    told = difference({1: 1.0, 2: 2.0}, {1: 0.5, 2: 1.5})
    assert told.low == told.mean == told.high == 0.5


numbers = st.dictionaries(st.integers(0, 50), st.floats(-100, 100), min_size=2, max_size=6)


@given(numbers, numbers)
@example({0: 0.0, 1: 0.0}, {0: 0.0, 2: 1e-99})
def test_the_other_way_round_is_the_negative(a: dict[int, float], b: dict[int, float]) -> None:
    one, other = difference(a, b), difference(b, a)
    assert one.mean == pytest.approx(-other.mean)
    assert one.low == pytest.approx(-(other.high or 0.0))
    assert one.method == other.method


@given(numbers)
def test_the_mean_is_inside(a: dict[int, float]) -> None:
    mean, low, high = mean_interval(list(a.values()))
    assert low is not None
    assert high is not None
    assert low <= mean <= high
