"""Numbers and findings in words."""

import math

from megacpt.eval.stability import Gap
from megacpt.report.run import Metric

MINUS = "\u2212"


def counted(number: float) -> str:
    """A count with three digits: 131K, 5.24M, 1.31B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size * 0.9995:
            return f"{number / size:.3g}{letter}"
    return f"{number:.4g}"


def tokens_text(tokens: float) -> str:
    """As counted, with the unit."""
    return f"{counted(tokens)} tokens"


def value_text(value: float) -> str:
    """A measured value: three decimals; of one below 0.01 two digits."""
    if math.isnan(value):
        return "n/a"
    digits = 3 if abs(value) >= 0.01 or value == 0 else 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(digits, 8)}f}".replace("-", MINUS)


def signed(value: float) -> str:
    """With its sign, a true minus."""
    return value_text(value) if value < 0 else f"+{value_text(value)}"


def percent(share: float) -> str:
    """A share as per cent, one decimal."""
    return "n/a" if math.isnan(share) else f"{100 * share:.1f}".replace("-", MINUS)


def interval_text(low: float | None, high: float | None) -> str:
    """[low, high], or nothing."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return ""
    return f"[{value_text(low)}, {value_text(high)}]"


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 05 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def gap_sentence(metric: Metric, *, ended: bool, subject: str | None = None) -> str:
    """What a curve did, in one sentence.

    Args:
        ended: whether the run is over; else "so far".
        subject: what the sentence begins with instead of the metric's title; "" where a heading says it.
    """
    sentence = _sentence(metric, metric.heading if subject is None else subject, ended=ended)
    if subject != "":
        return sentence
    bare = sentence.lstrip(": ")
    return bare[:1].upper() + bare[1:]


def _sentence(metric: Metric, title: str, *, ended: bool) -> str:
    numbers = metric.gap
    if numbers is None:
        return f"{title}: no value."
    if numbers.start is None:
        best = f"best {value_text(numbers.best.value)} at {tokens_text(numbers.best.tokens)}"
        return f"{title}: not evaluated at step 0, so a gap cannot be told; {best}."
    if len(metric.curve) == 1:
        return f"{title} was {value_text(numbers.start.value)} at step 0; not evaluated since."
    worse = "fell" if metric.curve.higher_is_better else "rose"
    if not numbers.dipped:
        past = "below" if worse == "fell" else "above"
        return f"{title} never {worse} {past} its starting level: {_course(numbers, ended=ended)}."
    depth, where = value_text(numbers.depth or 0.0), tokens_text(numbers.worst.tokens)
    if numbers.depth_is_significant is False:
        # An interval that ignores shared items cannot call it chance; a paired one can.
        verdict = "within chance" if numbers.basis == "paired" else "inside the 95 % interval of step 0"
        if numbers.basis == "paired" and metric.runs > 1:
            verdict = f"within the spread of {metric.runs} seeds"
        return f"{title} {worse} by {depth} by {where}, {verdict}: {_course(numbers, ended=ended)}."
    recovery = numbers.tokens_to_recovery
    if recovery is None:
        end = "had not recovered by the end" if ended else "has not recovered so far"
        after = f"{end} (still {signed(numbers.delta or 0.0)})"
        if numbers.worst.iteration == numbers.final.iteration:
            after = end
    else:
        after = f"was back at its starting level at {tokens_text(recovery)}"
    untested = " (no interval known)" if numbers.depth_is_significant is None else ""
    return f"{title} {worse} by {depth} by {where}{untested} and {after}."


def _course(numbers: Gap, *, ended: bool) -> str:
    assert numbers.start is not None
    delta, now = numbers.delta or 0.0, "ended" if ended else "is now"
    if delta == 0:
        return f"it {now} where it began, at {value_text(numbers.final.value)}"
    way = "higher" if delta > 0 else "lower"
    first, last = value_text(numbers.start.value), value_text(numbers.final.value)
    return f"it {now} {value_text(abs(delta))} {way}, {first} to {last}"
