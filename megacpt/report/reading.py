"""Reading a run's folder, of a run that has ended, was stopped or still trains."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megacpt.errors import UserError
from megacpt.eval.stability import Floats, Point, make_curve
from megacpt.report.folder import read_provenance
from megacpt.report.rows import NotYet, Row, column, latest_of_each_step, optional_number, read_rows
from megacpt.report.run import Change, GradientProbe, Metric, RunData, Source, Suite, Training, WeightUpdates


def read_run(folder: Path, name: str) -> RunData:
    """Read a run's folder, of a run that has ended, was stopped or still trains.

    Raises:
        UserError: there is no such folder, or its metrics are missing, empty or damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run; give the folder that save.dir named")
    rows = read_rows(folder / "metrics.jsonl")
    if not rows:
        raise NotYet(f"{folder / 'metrics.jsonl'}: no rows in it yet; wait for the first log interval")
    by_kind: dict[str, list[Row]] = {}
    for row in rows:
        by_kind.setdefault(row.kind, []).append(row)
    metrics = [
        *(m for measure in ("accuracy", "loss") for m in _set_metrics(by_kind.get("validation", []), measure)),
        *_named_metrics(by_kind.get("suite", []), "suite"),
        *_named_metrics(by_kind.get("task", []), "task"),
    ]
    return RunData(
        name=name,
        folder=folder,
        provenance=read_provenance(folder),
        metrics=metrics,
        training=_training(latest_of_each_step(by_kind.get("training", []))),
        updates=_updates(latest_of_each_step(by_kind.get("weight_update", []))),
        probe=_probe(latest_of_each_step(by_kind.get("gradient_probe", []))),
        suites=[_suite(row) for row in by_kind.get("suite", [])],
        notices=[*map(_failure, by_kind.get("failure", [])), *map(_guard, by_kind.get("guard", []))],
    )


def _grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key, str) for key in keys), []).append(row)
    return groups


def _points(rows: Sequence[Row], value: str, low: str, high: str) -> list[Point]:
    columns = zip(column(rows, value), column(rows, low), column(rows, high), strict=True)
    return [Point(row.iteration, row.tokens, *map(float, v)) for row, v in zip(rows, columns, strict=True)]


def _set_metrics(rows: Sequence[Row], measure: str) -> list[Metric]:
    found = []
    for (name,), own in _grouped(rows, "validation").items():
        own = [row for row in own if measure == "loss" or measure in row.values]
        curve = make_curve(
            _points(own, measure, f"{measure}_low", f"{measure}_high"), higher_is_better=measure == "accuracy"
        )
        if len(curve):
            paired = {row.iteration: change for row in own if (change := _change(row, measure)) is not None}
            found.append(Metric("set", name, measure, None, curve, paired))
    return found


def _named_metrics(rows: Sequence[Row], kind: str) -> list[Metric]:
    found = []
    for (name, measure), own in _grouped(rows, kind, "metric").items():
        curve = make_curve(
            _points(own, "value", "low", "high"), higher_is_better=bool(own[-1].values.get("higher_is_better", True))
        )
        paired = {row.iteration: change for row in own if (change := _change(row)) is not None}
        if len(curve):
            suite = own[-1].values.get("suite") if kind == "task" else None
            found.append(Metric(kind, name, measure, suite, curve, paired))
    return found


def _change(row: Row, measure: str | None = None) -> Change | None:
    """The paired difference from step 0; of a row of several measures, of one of them."""
    paired = row.values.get("paired")
    if measure is not None and isinstance(paired, dict):
        paired = paired.get(measure)
    if not isinstance(paired, dict) or paired.get("iteration") != 0:
        return None
    delta, low, high = (paired.get(name) for name in ("delta", "low", "high"))
    if not isinstance(delta, float | int):
        return None
    known = isinstance(low, float | int) and isinstance(high, float | int)
    return Change(delta, low, high) if known else Change(delta, None, None)


def _numbers(value: Any) -> dict[str, float]:
    return {str(name): optional_number(number) for name, number in dict(value).items()}


def _training(rows: Sequence[Row]) -> Training:
    names = list(dict.fromkeys(n for row in rows for n in row.get("tokens_by_source", _numbers)))

    def by_source(key: str, name: str) -> Floats:
        return np.array([row.get(key, _numbers).get(name, np.nan) for row in rows], np.float64)

    parts = ("loss_by_source", "tokens_by_source", "epochs_by_source")
    return Training(
        iteration=np.array([row.iteration for row in rows], np.int64),
        tokens=column(rows, "consumed_tokens"),
        loss=column(rows, "lm_loss"),
        learning_rate=column(rows, "learning_rate"),
        grad_norm=column(rows, "grad_norm"),
        tokens_per_second=column(rows, "tokens_per_second"),
        iteration_ms=column(rows, "iteration_ms"),
        mfu=column(rows, "mfu"),
        sources={name: Source(*(by_source(part, name) for part in parts)) for name in names},
    )


def _layers(row: Row, key: str) -> dict[int, dict[str, Any]]:
    return row.get(key, lambda value: {int(entry["layer"]): dict(entry) for entry in value})


def _by_layer(rows: Sequence[Row], key: str, field: str, layers: Sequence[int]) -> Floats:
    found = [_layers(row, key) for row in rows]
    return np.array(
        [[optional_number(entry.get(layer, {}).get(field)) for layer in layers] for entry in found], np.float64
    )


def _updates(rows: Sequence[Row]) -> WeightUpdates | None:
    if not rows:
        return None
    key, layers = "weight_update", sorted({layer for row in rows for layer in _layers(row, "weight_update")})
    ratios = [row.get("ratio", _numbers) for row in rows]
    return WeightUpdates(
        column(rows, "consumed_tokens"),
        layers,
        _by_layer(rows, key, "mean_ratio", layers),
        _by_layer(rows, key, "norm_ratio", layers),
        np.array([ratio.get("mean", np.nan) for ratio in ratios]),
        np.array([ratio.get("norm", np.nan) for ratio in ratios]),
        rows[-1].get("bottom", lambda value: int(value["layers"])),
    )


def _probe(rows: Sequence[Row]) -> GradientProbe | None:
    if not rows:
        return None
    layers = sorted({layer for row in rows for layer in _layers(row, "gradient_probe")})
    return GradientProbe(column(rows, "consumed_tokens"), layers, _by_layer(rows, "gradient_probe", "cosine", layers))


def _suite(row: Row) -> Suite:
    tasks = row.get("tasks", lambda value: {str(k): None if v is None else float(v) for k, v in value.items()})
    absent = tuple(map(str, row.values.get("absent") or ()))
    return Suite(row.get("suite", str), row.iteration, row.tokens, tasks, absent)


def _failure(row: Row) -> str:
    what = row.values["evaluation_error"]
    return f"Iteration {row.iteration:,}: evaluation of {what} failed: {row.values.get('message')}"


def _guard(row: Row) -> str:
    drop, most = row.get("drop", optional_number), row.get("max_drop", optional_number)
    did = {"warn": "warned", "stop": "stopped the run", "rollback": "ended the run at its best checkpoint"}
    action = str(row.values.get("action"))
    return (
        f"Iteration {row.iteration:,}: the guard of {row.values['guard']} {did.get(action, action)} "
        f"(worse by {drop:.4g}, {most:.4g} allowed)."
    )
