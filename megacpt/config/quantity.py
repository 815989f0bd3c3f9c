"""Quantities as people write them: `5B` tokens, `10%` of a mixture. Exact: no float rounds a count."""

import re
from fractions import Fraction

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
COUNT = re.compile(r"\+?(\d[\d_,]*(?:\.\d+)?|\.\d+)(?:[eE]\+?(\d{1,3}))?\s*([KMBTkmbt]?)")
SHARE = re.compile(r"\+?(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d{1,3}))?\s*(%?)")


def parse_count(value: str | int | float) -> int:
    """A whole number of things (tokens, documents): 5000000000, "5_000_000_000", "5e9", "5B", "1.5T".

    K, M, B and T are powers of 1000, in either case.

    Raises:
        ValueError: not a quantity, negative, or not whole ("1.5", "0.0001K").
    """
    number = _number(value) if not isinstance(value, str) else _count(value)
    if number is None:
        raise ValueError(f"{value!r} is not a quantity; write it as 5000000000, 5e9 or 5B (K, M, B, T)")
    if number < 0 or number.denominator != 1:
        raise ValueError(f"{value!r} is not a whole number of 0 or more; write it as 5000000000, 5e9 or 5B")
    return int(number)


def parse_share(value: str | int | float) -> float:
    """A part of a whole in [0, 1]: 0.1, "0.1" or "10%".

    Raises:
        ValueError: not a share, or outside [0, 1] (a bare 10 is not 10 %).
    """
    number = _number(value) if not isinstance(value, str) else _share(value)
    if number is None:
        raise ValueError(f"{value!r} is not a share; write it as 10% or 0.1")
    if not 0 <= number <= 1:
        raise ValueError(f"{value!r} is not between 0 and 1 (0% and 100%); write a tenth as 10% or 0.1")
    return float(number)


def format_count(count: int) -> str:
    """A count as `parse_count` reads it, in the largest unit that says it exactly: 5B, 1500M, 1234567."""
    unit = next(unit for unit in reversed(UNITS) if count % UNITS[unit] == 0 and (count or not unit))
    return f"{count // UNITS[unit]}{unit}"


def _number(value: int | float) -> Fraction | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value in (float("inf"), float("-inf")):
        return None
    return Fraction(str(value)) if value == value else None


def _count(text: str) -> Fraction | None:
    found = COUNT.fullmatch(text.strip())
    if found is None:
        return None
    digits, exponent, unit = found.groups()
    return Fraction(re.sub("[_,]", "", digits)) * 10 ** int(exponent or 0) * UNITS[unit.upper()]


def _share(text: str) -> Fraction | None:
    found = SHARE.fullmatch(text.strip())
    if found is None:
        return None
    digits, exponent, percent = found.groups()
    return Fraction(digits) * Fraction(10) ** int(exponent or 0) / (100 if percent else 1)
