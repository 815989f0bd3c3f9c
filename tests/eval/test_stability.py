import math
from dataclasses import astuple
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.eval.stability import Curve, Gap, Point, area_below, gap, make_curve

Values = list[float]


def curve(values: Values, *, higher: bool = True, spread: float | None = None, tokens: Values | None = None) -> Curve:
    """Evaluations at 0, 10, 20, ... tokens."""
    places = tokens or [10.0 * n for n in range(len(values))]
    points = [
        Point(n, x, v, None if spread is None else v - spread, None if spread is None else v + spread)
        for n, (x, v) in enumerate(zip(places, values, strict=True))
    ]
    return make_curve(points, higher_is_better=higher)


def numbers(made: Curve, paired: dict[int, bool] | None = None) -> Gap:
    found = gap(made, paired)
    assert found is not None
    return found


def test_no_dip() -> None:
    found = numbers(curve([0.2, 0.3, 0.25, 0.4], spread=0.01))
    assert found.start is not None
    assert (found.start.value, found.worst.iteration, found.best.iteration) == (0.2, 0, 3)
    assert (found.depth, found.area, found.tokens_to_recovery) == (0.0, 0.0, 0.0)
    assert not found.dipped
    assert found.recovered
    assert found.depth_is_significant is False
    assert found.delta == pytest.approx(0.2)
    assert found.delta_is_significant


def test_one_dip_by_hand() -> None:
    found = numbers(curve([0.28, 0.20, 0.24, 0.30], tokens=[0, 10, 20, 40], spread=0.01))
    assert (found.worst.iteration, found.worst.tokens, found.worst.value) == (1, 10, 0.20)
    assert found.depth == pytest.approx(0.08)
    assert found.depth_is_significant
    assert found.basis == "interval"
    # Triangle 0.4, trapezoid 0.6, and two thirds of the last stretch below: 0.04 * (20 * 2 / 3) / 2.
    assert found.area == pytest.approx(0.4 + 0.6 + 0.04 * 40 / 3 / 2)
    assert found.tokens_to_recovery == pytest.approx(20 + 20 * 2 / 3)
    assert (found.best.value, found.best.tokens) == (0.30, 40)


def test_a_fall_inside_the_interval_of_step_0_is_noise() -> None:
    found = numbers(curve([0.28, 0.275, 0.285], spread=0.01))
    assert found.depth == pytest.approx(0.005)
    assert found.depth_is_significant is False
    assert found.delta_is_significant is False
    assert numbers(curve([0.28, 0.275, 0.285])).depth_is_significant is None


def test_a_paired_verdict_goes_before_the_interval() -> None:
    made = curve([0.28, 0.275, 0.285], spread=0.01)
    found = numbers(made, {1: True, 2: True})
    assert (found.depth_is_significant, found.basis, found.delta_is_significant) == (True, "paired", True)
    assert numbers(curve([0.28, 0.1], spread=0.01), {1: False}).depth_is_significant is False


def test_never_recovers() -> None:
    found = numbers(curve([0.3, 0.2, 0.25, 0.29], spread=0.001))
    assert found.tokens_to_recovery is None
    assert not found.recovered
    assert found.delta == pytest.approx(-0.01)


def test_only_what_follows_the_worst_is_recovery() -> None:
    found = numbers(curve([0.3, 0.25, 0.31, 0.1, 0.3, 0.4]))
    assert found.worst.iteration == 3
    assert found.tokens_to_recovery == pytest.approx(40)


def test_lower_is_better() -> None:
    found = numbers(curve([5.0, 5.4, 5.2, 4.8], higher=False, spread=0.1))
    assert (found.worst.value, found.best.value) == (5.4, 4.8)
    assert found.depth == pytest.approx(0.4)
    assert found.tokens_to_recovery == pytest.approx(25)
    assert found.delta == pytest.approx(-0.2)


def test_a_single_point() -> None:
    found = numbers(curve([0.3], spread=0.1))
    assert (found.depth, found.area, found.tokens_to_recovery, found.delta) == (0, 0, 0, 0)
    assert found.delta_is_significant is False


def test_nothing_and_no_step_0() -> None:
    assert gap(make_curve([], higher_is_better=True)) is None
    found = numbers(make_curve([Point(5, 50, 0.2), Point(9, 90, 0.1)], higher_is_better=True))
    assert found.start is found.depth is found.area is found.tokens_to_recovery is found.delta is None
    assert (found.worst.value, found.best.value, found.final.iteration) == (0.1, 0.2, 9)


def test_missing_and_infinite_values_are_left_out_and_counted() -> None:
    points = [Point(0, 0, 0.3), Point(1, 10, math.nan), Point(2, 20, None), Point(3, 30, math.inf), Point(4, 40, 0.2)]
    made = make_curve(points, higher_is_better=True)
    assert made.iteration.tolist() == [0, 4]
    assert made.dropped == 3
    # The last evaluation of an iteration counts, even where it failed.
    assert len(make_curve([Point(1, 10, 0.5), Point(1, 10, None)], higher_is_better=True)) == 0


def test_after_a_resume_the_last_row_of_an_iteration_counts() -> None:
    rows = [Point(0, 0, 0.3), Point(2, 20, 0.9), Point(3, 30, 0.8), Point(1, 10, 0.2), Point(2, 20, 0.25)]
    made = make_curve(rows, higher_is_better=True)
    assert made.iteration.tolist() == [0, 1, 2, 3]
    assert made.value.tolist() == [0.3, 0.2, 0.25, 0.8]


def test_evaluations_at_equal_tokens_have_no_area_between_them() -> None:
    assert area_below(np.array([0.0, 0.0, 10.0]), np.array([0.0, -1.0, -1.0])) == 10.0


value = st.floats(-10, 10, allow_nan=False).map(lambda number: round(number, 6))
several = st.lists(value, min_size=1, max_size=12)


@given(several)
def test_turning_the_sign_turns_the_values_and_nothing_else(values: Values) -> None:
    up, down = numbers(curve(values, spread=0.5)), numbers(curve([-v for v in values], higher=False, spread=0.5))
    assert astuple(up)[4:9] == astuple(down)[4:9]
    assert up.delta == -(down.delta or 0.0)
    assert up.worst.value == -down.worst.value
    assert (up.worst.low, up.best.tokens) == (-down.worst.high, down.best.tokens)
    assert up.delta_is_significant == down.delta_is_significant


@given(several)
def test_depth_area_and_recovery_agree(values: Values) -> None:
    made = curve(values)
    found = numbers(made)
    assert found.depth is not None
    assert found.area is not None
    assert found.depth == max(0.0, values[0] - min(values))
    assert (found.depth > 0) == (found.area > 0) == found.dipped
    assert found.area <= found.depth * made.tokens[-1] * (1 + 1e-12)
    if found.dipped and found.tokens_to_recovery is not None:
        assert found.worst.tokens < found.tokens_to_recovery <= made.tokens[-1]
        later = made.value[made.tokens >= found.tokens_to_recovery - 1e-9]
        assert later.size
    if found.tokens_to_recovery is None:
        assert (made.value[found.worst.iteration :] < values[0]).all()


@given(several, st.floats(0.01, 1e6))
def test_tokens_scale_area_and_recovery(values: Values, factor: float) -> None:
    one = numbers(curve(values))
    other = numbers(curve(values, tokens=[10.0 * n * factor for n in range(len(values))]))
    assert other.depth == one.depth
    assert other.area == pytest.approx((one.area or 0.0) * factor)
    assert (other.tokens_to_recovery is None) == (one.tokens_to_recovery is None)
    assert other.tokens_to_recovery == pytest.approx((one.tokens_to_recovery or 0.0) * factor) or not one.recovered


@given(several, st.floats(-100, 100))
def test_a_constant_added_changes_no_number_of_the_dip(values: Values, constant: float) -> None:
    one, other = numbers(curve(values)), numbers(curve([v + constant for v in values]))
    assert other.depth == pytest.approx(one.depth, abs=1e-9)
    assert other.area == pytest.approx(one.area, abs=1e-6)
    assert other.delta == pytest.approx(one.delta, abs=1e-9)


@given(several, st.randoms())
def test_the_order_of_the_rows_does_not_matter(values: Values, random: Random) -> None:
    points = [Point(n, 10.0 * n, v) for n, v in enumerate(values)]
    shuffled = list(points)
    random.shuffle(shuffled)
    one, other = (numbers(make_curve(rows, higher_is_better=True)) for rows in (points, [*shuffled, *shuffled]))
    assert repr(one) == repr(other)


@given(st.lists(value, min_size=2, max_size=8), st.floats(0.05, 0.95))
def test_an_evaluation_on_the_line_adds_nothing(values: Values, share: float) -> None:
    tokens = [10.0 * n for n in range(len(values))]
    middle = values[0] + share * (values[1] - values[0])
    one = numbers(curve(values))
    other = numbers(curve([values[0], middle, *values[1:]], tokens=[0.0, 10 * share, *tokens[1:]]))
    assert other.area == pytest.approx(one.area, abs=1e-9)
    assert other.depth == pytest.approx(one.depth, abs=1e-12)
