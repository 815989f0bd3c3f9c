"""Charts of abilities over training: the gap itself, and the difference of two arms."""

from collections.abc import Sequence

import numpy as np

from megacpt.eval.stability import Gap, Mark, make_curve
from megacpt.report.arms import Arm, Key, difference_curve, keys_of, mean_metric
from megacpt.report.chart import POINTS_MOST, Finding, Level, LineChart, Note, Series
from megacpt.report.run import Metric
from megacpt.report.words import gap_sentence, signed, tokens_text, value_text

TEXTS_MOST = 2
"""Arms whose dips are named in the chart; of more only the places are ringed, the sentences have the numbers."""
BANDS_MOST = 5


def gap_charts(arms: Sequence[Arm]) -> list[LineChart]:
    """One chart for each metric, every arm in it."""
    return [gap_chart(arms, key) for key in keys_of(arms)]


def gap_chart(arms: Sequence[Arm], key: Key) -> LineChart:
    """A metric's curves, with step 0, the dip and the recovery."""
    with_it = [arm for arm in arms if arm.metrics(key)]
    means = [mean_metric(arm.metrics(key)) for arm in with_it]
    alone = len(arms) == 1
    series: list[Series] = []
    notes: list[Note] = []
    findings = []
    for arm, metric in zip(with_it, means, strict=True):
        series += _series(arm, arm.metrics(key), metric, label="" if alone else arm.name, band=len(means) <= BANDS_MOST)
        subject = None if alone else ""
        sentence = gap_sentence(metric, ended=arm.ended, subject=subject)
        findings.append(Finding(sentence, arm.colour, "" if alone else _name(arm)))
        if metric.gap is not None:
            notes += _notes(metric.gap, metric, arm.colour, text=len(means) <= TEXTS_MOST)
    return LineChart(
        title=means[0].heading,
        findings=tuple(findings),
        y_label=means[0].unit,
        series=tuple(series),
        write=value_text,
        levels=tuple(_levels(with_it, means)),
        notes=tuple(notes),
    )


def _name(arm: Arm) -> str:
    return arm.name if arm.single else f"{arm.name} (mean of {len(arm.runs)})"


def _series(arm: Arm, metrics: Sequence[Metric], mean: Metric, *, label: str, band: bool) -> list[Series]:
    curve = mean.curve
    low, high = (curve.low, curve.high) if band and np.isfinite(curve.low).any() else (None, None)
    dashed = arm.colour >= 4
    found = [
        Series(curve.tokens, curve.value, arm.colour, label, low, high, points=len(curve) <= POINTS_MOST, dashed=dashed)
    ]
    if len(metrics) > 1:
        found += [Series(m.curve.tokens, m.curve.value, arm.colour, "", faint=True) for m in metrics]
    return found


def _levels(arms: Sequence[Arm], means: Sequence[Metric]) -> list[Level]:
    """The level of step 0: one line where all arms share a base."""
    starts = [(arm.colour, metric.gap.start.value) for arm, metric in zip(arms, means, strict=True)
              if metric.gap is not None and metric.gap.start is not None]  # fmt: skip
    if not starts:
        return []
    values = [value for _, value in starts]
    if max(values) - min(values) <= 1e-6 * max(1.0, abs(values[0])):
        return [Level(values[0], "step 0")]
    return [Level(value, "", colour) for colour, value in starts]


def _notes(gap: Gap, metric: Metric, colour: int, *, text: bool) -> list[Note]:
    if not gap.dipped or gap.depth_is_significant is False or gap.start is None or gap.depth is None:
        return []
    fall = -gap.depth if metric.curve.higher_is_better else gap.depth
    base = gap.start.value
    dip = f"{signed(fall)} at {tokens_text(gap.worst.tokens)}" if text else ""
    notes = [Note("dip", gap.worst.tokens, gap.worst.value, base, dip, colour)]
    if gap.tokens_to_recovery is not None:
        where = gap.start.tokens + gap.tokens_to_recovery
        back = f"back at {tokens_text(where)}" if text else ""
        notes.append(Note("recovery", where, base, base, back, colour, above=metric.curve.higher_is_better))
    return notes


def difference_charts(a: Arm, b: Arm) -> list[LineChart]:
    """Arm a minus arm b over training, for each metric that both have."""
    charts = []
    for key in keys_of([a, b]):
        points, method = difference_curve(a, b, key)
        metrics = a.metrics(key)
        if not points or not metrics:
            continue
        curve = make_curve(points, higher_is_better=metrics[0].curve.higher_is_better)
        largest, last = curve.mark(int(np.argmax(np.abs(curve.value)))), curve.mark(len(curve) - 1)
        told = [f"Largest {_verdict(largest, a, b, curve.higher_is_better)}"]
        if last != largest:
            told.append(f"At the end {_verdict(last, a, b, curve.higher_is_better)}")
        told.append(f"Intervals: {method}." if method != "one seed" else "One seed has no interval.")
        low, high = (None, None) if np.isnan(curve.low).all() else (curve.low, curve.high)
        charts.append(
            LineChart(
                title=f"{metrics[0].heading}: {a.name} minus {b.name}",
                findings=(Finding(" ".join(told), a.colour),),
                y_label=f"difference ({metrics[0].unit.partition(' (')[0]})",
                series=(Series(curve.tokens, curve.value, a.colour, "", low, high, points=len(curve) <= POINTS_MOST),),
                write=lambda value: signed(value) if value else "0",
                levels=(Level(0.0, "equal"),),
            )
        )
    return charts


def _verdict(mark: Mark, a: Arm, b: Arm, higher_is_better: bool) -> str:
    told = f"{signed(mark.value)} at {tokens_text(mark.tokens)}"
    if np.isnan(mark.low):
        return f"{told}."
    better = (mark.value > 0) == higher_is_better
    away = mark.low > 0 or mark.high < 0
    winner = f"{a.name if better else b.name} is better" if away else "no difference beyond chance"
    return f"{told} [{signed(mark.low)}, {signed(mark.high)}]: {winner}."
