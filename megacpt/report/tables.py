"""The report's tables as headings and cells of text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megacpt.eval.seeds import Difference
from megacpt.eval.stability import Gap, Mark
from megacpt.report.arms import Arm, compare, keys_of, mean_metric
from megacpt.report.run import Metric, RunData, Suite
from megacpt.report.words import (
    counted,
    gap_sentence,
    interval_text,
    percent,
    signed,
    tokens_text,
    value_text,
)

GAP_COLUMNS = (
    "metric", "run", "step 0", "worst", "dip depth", "dip area", "tokens to recovery", "peak", "final",
    "final \u2212 step 0",
)  # fmt: skip

OF_A_DIP = ("dip depth", "dip area", "tokens to recovery")


@dataclass(frozen=True)
class Cell:
    """Text, a second line in small type, a colour number (or None), and whether it is emphasised."""

    text: str
    small: str = ""
    colour: int | None = None
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Headings and rows; the first `words` columns are text, the others numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: int = 1


def gap_table(arms: Sequence[Arm]) -> Table:
    """The gap's numbers, by metric and run."""
    rows = []
    for key in keys_of(arms):
        for arm in arms:
            for run in arm.runs:
                metric = run.metric(key)
                numbers = metric.gap if metric is not None else None
                if metric is not None and numbers is not None:
                    name = Cell(metric.heading, metric.suite or "")
                    rows.append((name, Cell(run.name, colour=arm.colour), *_gap_cells(run, metric, numbers)))
    return Table(GAP_COLUMNS, tuple(rows), words=2)


def _gap_cells(run: RunData, metric: Metric, gap: Gap) -> tuple[Cell, ...]:
    peak = Cell(value_text(gap.best.value), f"at {counted(gap.best.tokens)}{_epoch(run, gap.best)}")
    final = Cell(value_text(gap.final.value), interval_text(gap.final.low, gap.final.high))
    worst = Cell(value_text(gap.worst.value), f"at {counted(gap.worst.tokens)}")
    if gap.start is None or gap.depth is None or gap.area is None:
        none = Cell("n/a", "no step 0")
        return none, worst, none, none, none, peak, final, none
    start = Cell(value_text(gap.start.value), interval_text(gap.start.low, gap.start.high))
    back = gap.tokens_to_recovery
    recovery = Cell("never" if back is None else counted(back) if gap.dipped else "\u2013")
    if back is None and not run.ended:
        recovery = Cell("not yet")
    unit = "nats" if metric.measure == "loss" else "share"
    area = Cell(counted(gap.area), f"{unit} \u00d7 tokens") if gap.dipped else Cell("\u2013")
    depth = (
        Cell(value_text(gap.depth), _verdict(gap, metric), strong=bool(gap.depth_is_significant))
        if gap.dipped
        else Cell("none")
    )
    told = {True: "significant", False: "not significant", None: "not tested"}[gap.delta_is_significant]
    change = _change_text(metric, gap.final)
    told = f"{told} {change}" if change and not gap.delta_is_significant else change or told
    small = told if gap.final.iteration else ""
    delta = Cell(signed(gap.delta or 0.0), small, strong=bool(gap.delta_is_significant))
    return start, worst, depth, area, recovery, peak, final, delta


def _change_text(metric: Metric, mark: Mark, *, depth: bool = False) -> str:
    """The interval of an evaluation's paired difference from step 0; as a depth, of how much worse it is."""
    change = metric.paired.get(mark.iteration)
    if change is None or change.low is None or change.high is None:
        return ""
    turned = depth and metric.curve.higher_is_better
    return interval_text(-change.high, -change.low) if turned else interval_text(change.low, change.high)


def _verdict(gap: Gap, metric: Metric) -> str:
    if gap.depth_is_significant is None:
        return "not tested"
    if gap.basis == "paired":
        bounds = _change_text(metric, gap.worst, depth=True)
        return bounds if gap.depth_is_significant else f"within chance {bounds}"
    return "significant" if gap.depth_is_significant else "inside the interval"


def _epoch(run: RunData, mark: Mark) -> str:
    epochs = run.training.epochs_at(mark.tokens)
    return f", epoch {epochs[run.domain]:.2f}" if run.domain in epochs else ""


def comparison_table(a: Arm, b: Arm) -> Table:
    """The gap's numbers of two arms, their difference and its interval."""
    rows = []
    for key in keys_of([a, b]):
        metrics = a.metrics(key)
        if not metrics or not b.metrics(key):
            continue
        for number in compare(a, b, key):
            if number.what in OF_A_DIP and number.a == number.b == 0:
                continue  # no run of either arm has a dip
            write = counted if "tokens" in number.what or "area" in number.what else value_text
            values = [
                Cell(
                    "\u2013" if value is None else write(value),
                    f"{missing} of {len(arm.runs)} never" if missing else "",
                )
                for value, missing, arm in zip((number.a, number.b), number.missing, (a, b), strict=True)
            ]
            rows.append((Cell(metrics[0].heading), Cell(number.what), *values, *_difference(number.difference)))
    return Table(("metric", "number", a.name, b.name, "difference", "method"), tuple(rows), words=2)


def _difference(told: Difference | None) -> tuple[Cell, Cell]:
    if told is None:
        return Cell("\u2013"), Cell("not in every run")
    large = abs(told.mean) >= 1000

    def write(value: float) -> str:
        text = counted(value).replace("-", "\u2212") if large else value_text(value)
        return text if value < 0 else f"+{text}"

    bounds = "" if told.low is None or told.high is None else f"[{write(told.low)}, {write(told.high)}]"
    seeds = f"{told.seeds[0]}" if told.seeds[0] == told.seeds[1] else f"{told.seeds[0]} and {told.seeds[1]}"
    return Cell(write(told.mean), bounds, strong=bool(told.significant)), Cell(told.method, f"{seeds} seeds")


def suite_table(arms: Sequence[Arm], suite: str) -> Table:
    """A table as the paper's Table 1: base, then each run's last evaluation; means computed from the cells."""
    entries: list[tuple[Cell, float, Suite]] = []
    for arm in arms:
        for run in arm.runs:
            own = [entry for entry in run.suites if entry.name == suite]
            if own and own[0].iteration == 0:
                entries.append((Cell("base", f"step 0 of {run.name}"), 0.0, own[0]))
            if own and own[-1].iteration:
                entries.append((Cell(run.name, colour=arm.colour), own[-1].tokens, own[-1]))
    entries = _one_base(entries)
    tasks = list(dict.fromkeys(task for _, _, entry in entries for task in (*entry.tasks, *entry.absent)))
    means = [suite_mean(entry) for _, _, entry in entries]
    best = [max((v for _, _, e in entries if (v := e.tasks.get(task)) is not None), default=None) for task in tasks]
    top = max((mean for mean in means if mean is not None), default=None)
    rows = []
    for (name, tokens, entry), mean in zip(entries, means, strict=True):
        values = [_score(entry.tasks.get(task), most) for task, most in zip(tasks, best, strict=True)]
        lacking = [task for task in tasks if entry.tasks.get(task) is None]
        average = _score(mean, top) if mean is not None else Cell("withheld", f"no {', '.join(lacking)}")
        rows.append((name, Cell(counted(tokens) if tokens else "\u2013"), *values, average))
    return Table(("method", "tokens", *tasks, "average"), tuple(rows))


def suite_mean(suite: Suite) -> float | None:
    """The unweighted mean of a suite's tasks; None where one is absent."""
    values = [value for value in suite.tasks.values() if value is not None]
    complete = values and not suite.absent and len(values) == len(suite.tasks)
    return float(np.mean(values)) if complete else None


def _score(value: float | None, best: float | None) -> Cell:
    return Cell("\u2013") if value is None else Cell(percent(value), strong=value == best)


def _one_base(entries: list[tuple[Cell, float, Suite]]) -> list[tuple[Cell, float, Suite]]:
    """Base rows first, and one alone where all are equal: runs of one base share its numbers."""
    bases = [entry for entry in entries if not entry[1]]
    others = [entry for entry in entries if entry[1]]
    if bases and all(entry[2].tasks == bases[0][2].tasks for entry in bases):
        bases = [(Cell("base", "step 0"), 0.0, bases[0][2])]
    return [*bases, *others]


def headline(arms: Sequence[Arm]) -> str:
    """What a reader should take away first: the deepest dip of ability, else the first metric's course."""
    best: tuple[float, str] | None = None
    for key in keys_of(arms):
        for arm in arms:
            metrics = arm.metrics(key)
            if not metrics:
                continue
            metric = mean_metric(metrics)
            gap = metric.gap
            subject = None if len(arms) == 1 else f"{arm.name}: {metric.title}"
            sentence = gap_sentence(metric, ended=arm.ended, subject=subject)
            size = 0.0
            if gap is not None and gap.start is not None and gap.depth and gap.depth_is_significant is not False:
                size = gap.depth / (abs(gap.start.value) or 1.0)
            if best is None or size > best[0]:
                best = size, sentence
    return best[1] if best else f"{tokens_text(max(arm.runs[0].tokens for arm in arms))} trained on; no evaluation yet."
