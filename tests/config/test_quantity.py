"""5B, 10 % and everything that is neither."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.config.quantity import UNITS, format_count, parse_count, parse_share


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ("5B", 5_000_000_000),
        ("500M", 500_000_000),
        ("1.5T", 1_500_000_000_000),
        ("5 b", 5_000_000_000),
        ("12k", 12_000),
        (".5K", 500),
        ("4.100000001B", 4_100_000_001),
        ("5_000", 5_000),
        ("1,572,864", 1_572_864),
        ("5e9", 5_000_000_000),
        ("0", 0),
        (7, 7),
        (5e9, 5_000_000_000),
        ("9007199254740993", 9007199254740993),  # no float holds it
    ],
)
def test_counts(value: str | int | float, count: int) -> None:
    assert parse_count(value) == count


@pytest.mark.parametrize(
    "value",
    ["", "B", "5Q", "5GB", "-5B", "five", "1.5", "1 2", "0x10", "5e-9", True, -1, 1.5, float("nan"), float("inf")],
)
def test_no_counts(value: str | int | float) -> None:
    with pytest.raises(ValueError, match=r"write it as 5000000000, 5e9 or 5B"):
        parse_count(value)


@pytest.mark.parametrize(
    ("value", "share"),
    [("10%", 0.1), ("0.1", 0.1), (0.1, 0.1), ("82.5 %", 0.825), ("1e-3", 0.001), (0, 0.0), ("100%", 1.0), (1, 1.0)],
)
def test_shares(value: str | int | float, share: float) -> None:
    assert parse_share(value) == share


@pytest.mark.parametrize("value", ["", "%", "10", "101%", "-1%", "a tenth", 10, -0.1, True, float("nan"), float("inf")])
def test_no_shares(value: str | int | float) -> None:
    with pytest.raises(ValueError, match=r"write (it|a tenth) as 10% or 0\.1"):
        parse_share(value)


@given(st.integers(0, 10**16), st.sampled_from(list(UNITS)))
def test_a_formatted_count_reads_back(number: int, unit: str) -> None:
    count = number * UNITS[unit]
    assert parse_count(format_count(count)) == count
