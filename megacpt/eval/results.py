"""From an evaluation to rows of metrics.jsonl, lines for people, and files with a record of each item."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacpt.errors import UserError
from megacpt.eval.statistics import Estimate, Items, Measure, difference, estimate
from megacpt.eval.suites import GROUPS, SUITE_METRIC, SUITES, Selection
from megacpt.files import atomic_write

if TYPE_CHECKING:
    from megacpt.eval.tasks import Evaluation, Metric

Row = dict[str, Any]
Base = Mapping[str, Items]
"""Of an earlier evaluation: items by the name of their measure, such as "task/metric"."""


def rows_of(evaluation: "Evaluation", selection: Selection, base: Base | None, base_iteration: int | None) -> list[Row]:
    """Task, group and suite rows, then what failed.

    Args:
        base: the evaluation to pair with, and `base_iteration` when it was made (None: of another run).
    """
    rows, errors = [], []
    for task, result in evaluation.results.items():
        suite = selection.suite_of(task)
        for name, metric in result.metrics.items():
            paired = paired_row([metric.measure], base, base_iteration) if metric.measure is not None else None
            interval = None if metric.measure is None else estimate([metric.measure])
            rows.append(_task_row(task, suite, name, metric, interval, len(result.items), paired))
            if not math.isfinite(metric.value):
                errors.append(error_row(task, f"its {name} is {metric.value}"))
    accuracies = _accuracies(evaluation)
    for group in selection.groups:
        members = [accuracies[task] for task in GROUPS[group] if task in accuracies]
        if len(members) == len(GROUPS[group]):
            paired = paired_row([members], base, base_iteration)
            rows.append(_group_row(group, selection.suite_of(group), members, paired))
    rows += [_suite_row(suite, accuracies, base, base_iteration) for suite in selection.suites]
    return rows + errors + [error_row(task, message) for task, message in evaluation.failures.items()]


def error_row(name: str, message: str) -> Row:
    """The row of what could not be evaluated."""
    return {"evaluation_error": name, "message": " ".join(message.split())}


def _accuracies(evaluation: "Evaluation") -> dict[str, Measure]:
    """By task; only finite ones."""
    found = {}
    for task, result in evaluation.results.items():
        metric = result.metrics.get(SUITE_METRIC)
        if metric is not None and metric.measure is not None and math.isfinite(metric.value):
            found[task] = metric.measure
    return found


def _task_row(
    task: str,
    suite: str | None,
    name: str,
    metric: "Metric",
    interval: Estimate | None,
    items: int,
    paired: Row | None,
) -> Row:
    return {
        "task": task,
        "suite": suite,
        "metric": name,
        "value": _finite(metric.value),
        "low": _finite(interval.low) if interval is not None else None,
        "high": _finite(interval.high) if interval is not None else None,
        "items": items,
        "higher_is_better": metric.higher_is_better,
        "paired": paired,
    }


def _group_row(group: str, suite: str | None, members: Sequence[Measure], paired: Row | None) -> Row:
    mean = estimate([members])
    return {
        "task": group,
        "suite": suite,
        "metric": SUITE_METRIC,
        "value": mean.value,
        "low": mean.low,
        "high": mean.high,
        "items": sum(len(measure.keys) for measure in members),
        "higher_is_better": True,
        "paired": paired,
    }


def _suite_row(suite: str, accuracies: Mapping[str, Measure], base: Base | None, base_iteration: int | None) -> Row:
    members = {member: GROUPS.get(member, (member,)) for member in SUITES[suite]}
    absent = [task for tasks in members.values() for task in tasks if task not in accuracies]
    parts = {name: [accuracies[t] for t in tasks] for name, tasks in members.items() if accuracies.keys() >= {*tasks}}
    mean = None if absent else estimate(list(parts.values()))
    return {
        "suite": suite,
        "metric": "mean",
        "value": mean and mean.value,
        "low": mean and mean.low,
        "high": mean and mean.high,
        "absent": absent,
        "tasks": {name: estimate([measures]).value for name, measures in parts.items()},
        "paired": None if absent else paired_row(list(parts.values()), base, base_iteration),
    }


def paired_row(measures: Sequence[Measure | Sequence[Measure]], base: Base | None, iteration: int | None) -> Row | None:
    """Their mean minus that of an earlier evaluation, over the items that both have; None where that cannot be told.

    Args:
        base, iteration: the earlier evaluation; None: there is none, or it is another run's.
    """
    found = difference(measures, base) if base is not None else None
    if found is None or not math.isfinite(found[0].value):
        return None
    delta, items = found
    return {
        "iteration": iteration,
        "delta": delta.value,
        "low": delta.low,
        "high": delta.high,
        "significant": delta.excludes_zero,
        "items": items,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def line_of(row: Row) -> str:
    """A row for people."""
    if "evaluation_error" in row:
        return f"evaluation of {row['evaluation_error']} failed: {row['message']}"
    if "task" in row:
        parts = [f"{row['task']} {row['metric']}: {_interval(row)}", f"{row['items']:,} items"]
    elif row["absent"]:
        return f"{row['suite']}: no mean, absent: {', '.join(row['absent'])}"
    else:
        parts = [f"{row['suite']} mean of {len(row['tasks'])}: {_interval(row)}"]
    if row["paired"] is not None:
        verdict = "significant" if row["paired"]["significant"] else "within the noise"
        since = "the other" if row["paired"]["iteration"] is None else f"iteration {row['paired']['iteration']}"
        parts.append(f"{_signed(row['paired'])} against {since}, {verdict}")
    return " | ".join(parts)


def _interval(row: Row) -> str:
    value = "none" if row["value"] is None else f"{row['value']:.4f}"
    return value if row["low"] is None else f"{value} ({row['low']:.4f} to {row['high']:.4f})"


def _signed(paired: Row) -> str:
    interval = "" if paired["low"] is None else f" ({paired['low']:+.4f} to {paired['high']:+.4f})"
    return f"{paired['delta']:+.4f}{interval}"


def write_items(path: Path, evaluation: "Evaluation") -> None:
    """A record of each item of each task, one JSON object a line; not-a-number as null."""
    with atomic_write(path, "w") as handle:
        for result in evaluation.results.values():
            for item in result.items:
                handle.write(json.dumps(_nulled(item), ensure_ascii=False, allow_nan=False) + "\n")


def _nulled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulled(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_nulled(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_items(path: Path) -> Base:
    """Items by "task/metric" from such a file, for pairing; what was null is left out.

    Raises:
        UserError: no such file, or not one of these.
    """
    base: dict[str, dict[str, tuple[float, float]]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        for task, metric, key, value in _values(map(json.loads, lines)):
            pair = (value[0], value[1]) if isinstance(value, list) else (value, 1)
            if all(isinstance(part, int | float) for part in pair):
                base.setdefault(f"{task}/{metric}", {})[key] = (float(pair[0]), float(pair[1]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no file of items as tools/evaluate.py writes it ({error}); name another") from error
    return base


def _values(items: Iterable[Row]) -> Iterable[tuple[str, str, str, Any]]:
    for item in items:
        suffix = f",{item['filter']}" if "filter" in item else ""
        for metric, value in item["metrics"].items():
            yield item["task"], metric + suffix, item["item"], value
