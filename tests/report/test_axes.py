import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.report.axes import LinearAxis, LogAxis, nice_step, smoothed, spread, thinned, token_axis, value_axis

positive = st.floats(1e-3, 1e12)


def test_zero_has_a_place_on_a_log_axis() -> None:
    axis = token_axis([np.array([0.0, 4096.0, 819200.0])], log=True)
    assert isinstance(axis, LogAxis)
    places = axis.place(np.array([0.0, 2048.0, 4096.0, 819200.0]))
    assert places[0] == 0
    assert 0 < places[1] < places[2] < places[3] == pytest.approx(1)


def test_a_log_axis_needs_two_places() -> None:
    assert isinstance(token_axis([np.array([0.0, 4096.0])], log=True), LinearAxis)
    assert isinstance(token_axis([np.array([0.0])], log=True), LinearAxis)
    assert isinstance(token_axis([], log=True), LinearAxis)


@given(positive, st.floats(1.001, 1e9))
def test_log_places_rise_and_ticks_lie_on_the_axis(first: float, factor: float) -> None:
    axis = LogAxis(first, first * factor)
    places = axis.place(np.concatenate([[0.0], np.geomspace(first, first * factor, 20)]))
    assert (np.diff(places) > 0).all()
    assert places[-1] == pytest.approx(1)
    ticks = axis.ticks(8)
    assert ticks[0] == 0
    assert len(ticks) <= 8
    assert all(first <= tick <= first * factor for tick in ticks[1:])


@given(st.floats(-1e6, 1e6), positive)
def test_linear_ticks_are_round_few_and_inside(low: float, span: float) -> None:
    axis = LinearAxis(low, low + span)
    if axis.high <= axis.low or span < abs(low) * 1e-9:
        return
    ticks = axis.ticks(6)
    assert len(ticks) <= 7
    slack = span * 1e-6 + 1e-9
    assert all(axis.low - slack <= tick <= axis.high + slack for tick in ticks)


def test_nice_steps() -> None:
    assert [nice_step(x) for x in (0.9, 1.0, 1.1, 2.2, 3.0, 7.0)] == [1, 1, 2, 2.5, 5, 10]


def test_a_value_axis_of_nothing_one_value_and_infinity() -> None:
    assert value_axis([], None) == LinearAxis(0.0, 1.0)
    assert value_axis([np.array([np.nan])], None) == LinearAxis(0.0, 1.0)
    for values in ([2.0], [0.0], [2.0, np.inf, np.nan]):
        axis = value_axis([np.array(values)], None)
        assert axis.low < values[0] < axis.high
    assert value_axis([np.array([5.0])], (0.0, 1.0)) == LinearAxis(0.0, 1.0)


@given(st.lists(st.floats(0, 100), max_size=8))
def test_labels_are_apart_in_order_and_inside(places: list[float]) -> None:
    moved = spread(places, 10, 0, 100)
    order = sorted(range(len(places)), key=places.__getitem__)
    gaps = np.diff([moved[number] for number in order])
    assert (gaps >= 10 - 1e-9).all()
    assert all(-1e-9 <= place <= 100 + 1e-9 for place in moved)


@given(st.integers(1, 3000))
def test_thinning_keeps_ends_short_lines_and_means(count: int) -> None:
    x = np.arange(1.0, count + 1)
    thin_x, thin_y = thinned(x, 2 * x)
    assert len(thin_x) <= 500
    np.testing.assert_allclose(thin_y, 2 * thin_x)
    assert thin_x[0] == 1
    if count <= 500:
        assert thin_x.tolist() == x.tolist()


def test_thinning_passes_over_holes() -> None:
    y = np.ones(2000)
    y[::3] = np.nan
    _, thin = thinned(np.arange(2000.0), y)
    assert set(thin[np.isfinite(thin)].tolist()) == {1.0}


@given(st.integers(1, 500))
def test_smoothing_leaves_lines_and_first_steps_alone(count: int) -> None:
    y = 3.0 * np.arange(count)
    np.testing.assert_allclose(smoothed(y), y, atol=1e-6)
    noisy = np.where(np.arange(count) % 2, 1.0, -1.0)
    assert smoothed(noisy)[:8].tolist() == noisy[:8].tolist()
    assert len(smoothed(noisy)) == count
    assert np.isnan(smoothed(np.full(count, np.nan))).all()
