import math
from dataclasses import replace

import pytest

from megacpt.eval.stability import Point, make_curve
from megacpt.report.run import Change, Metric
from megacpt.report.words import counted, duration, gap_sentence, interval_text, signed, value_text


def metric(values: list[float], *, spread: float | None = 0.01, first: int = 0, measure: str = "accuracy") -> Metric:
    points = [
        Point(first + n, 1e5 * (first + n), v, *((None, None) if spread is None else (v - spread, v + spread)))
        for n, v in enumerate(values)
    ]
    higher = measure != "loss"
    return Metric("set", "general", measure, None, make_curve(points, higher_is_better=higher), {})


@pytest.mark.parametrize(
    ("values", "ended", "sentence"),
    [
        ([0.283, 0.25, 0.218, 0.243], True,
         "General next-token accuracy fell by 0.065 by 200K tokens and had not recovered by the end (still −0.040)."),
        ([0.283, 0.25, 0.218], True,
         "General next-token accuracy fell by 0.065 by 200K tokens and had not recovered by the end."),
        ([0.283, 0.25, 0.218, 0.243], False,
         "General next-token accuracy fell by 0.065 by 200K tokens and has not recovered so far (still −0.040)."),
        ([0.3, 0.2, 0.3], True,
         "General next-token accuracy fell by 0.100 by 100K tokens and was back at its starting level at 200K tokens."),
        ([0.3, 0.4], True,
         "General next-token accuracy never fell below its starting level: it ended 0.100 higher, 0.300 to 0.400."),
        ([0.3, 0.295, 0.3], True,
         "General next-token accuracy fell by 0.0050 by 100K tokens, inside the 95 % interval of step 0: it "
         "ended where it began, at 0.300."),
        ([0.3], True, "General next-token accuracy was 0.300 at step 0; not evaluated since."),
    ],
)  # fmt: skip
def test_what_a_curve_did(values: list[float], ended: bool, sentence: str) -> None:
    assert gap_sentence(metric(values), ended=ended) == sentence


@pytest.mark.parametrize(("runs", "words"), [(1, "within chance"), (3, "within the spread of 3 seeds")])
def test_a_paired_verdict_says_of_what(runs: int, words: str) -> None:
    found = replace(metric([0.3, 0.2, 0.25]), paired={1: Change(-0.1, -0.3, 0.1)}, runs=runs)
    assert gap_sentence(found, ended=True) == (
        f"General next-token accuracy fell by 0.100 by 100K tokens, {words}: it ended 0.050 lower, 0.300 to 0.250."
    )
    found = replace(found, paired={1: Change(-0.1, -0.15, -0.05)})
    assert "and had not recovered" in gap_sentence(found, ended=True)


def test_loss_rises() -> None:
    told = gap_sentence(metric([5.0, 5.5, 4.9], measure="loss", spread=None), ended=True)
    assert told == (
        "General loss rose by 0.500 by 100K tokens (no interval known) and was back at its starting level at "
        "183K tokens."
    )


def test_without_step_0_or_any_value() -> None:
    assert "not evaluated at step 0" in gap_sentence(metric([0.2, 0.3], first=3), ended=True)
    assert gap_sentence(metric([]), ended=True) == "General next-token accuracy: no value."


def test_a_sentence_below_a_heading_needs_no_subject() -> None:
    assert gap_sentence(metric([0.3, 0.2, 0.3]), ended=True, subject="").startswith("Fell by 0.100")
    assert gap_sentence(metric([0.2, 0.3], first=3), ended=True, subject="").startswith("Not evaluated")


def test_numbers() -> None:
    assert [counted(n) for n in (0, 512, 4096, 999_999, 1.31e9, 2e12)] == ["0", "512", "4.1K", "1M", "1.31B", "2T"]
    assert [value_text(n) for n in (0.0, 0.283, 5.257, 0.00412, 1e-12)] == [
        "0.000",
        "0.283",
        "5.257",
        "0.0041",
        "0.00000000",
    ]
    assert value_text(math.nan) == "n/a"
    assert [signed(n) for n in (0.1, -0.1)] == ["+0.100", "\u22120.100"]
    assert interval_text(0.1, None) == ""
    assert interval_text(0.1, 0.2) == "[0.100, 0.200]"
    assert [duration(s) for s in (45, 600, 7500, 2e5)] == ["45 s", "10 min", "2 h 05 min", "2 d 7 h"]
