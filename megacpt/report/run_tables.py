"""Tables about runs rather than abilities: state and speed, configuration, provenance."""

from collections.abc import Iterable, Sequence

import numpy as np

from megacpt.report.arms import Arm
from megacpt.report.run import RunData
from megacpt.report.tables import Cell, Table
from megacpt.report.words import counted, duration, percent


def run_table(arms: Sequence[Arm]) -> Table:
    """The runs: how far, how fast, on what, in which layout."""
    rows = []
    for arm in arms:
        for run in arm.runs:
            name = Cell(run.name, arm.name if not arm.single else "", colour=arm.colour, strong=True)
            training, layout = run.training, run.provenance.checkpoint.get("layout") or {}
            speed = float(np.nanmedian(training.tokens_per_second)) if len(training.tokens) else float("nan")
            rows.append(
                (
                    name,
                    Cell(*status(run)),
                    Cell(_sources(run)),
                    Cell(_layout(run, layout)),
                    Cell(counted(run.tokens), f"{run.iteration:,} steps"),
                    Cell("n/a" if np.isnan(speed) else f"{speed:,.0f}"),
                )
            )
    columns = ("run", "state", "sources: share of tokens, epochs", "layout", "tokens", "tokens/s")
    return Table(columns, tuple(rows), words=4)


def status(run: RunData) -> tuple[str, str]:
    """Ended, running or stopped; and how far."""
    total = run.provenance.last_iteration
    if run.ended:
        return "ended", ""
    word = {True: "running", False: "stopped", None: "not ended"}[run.provenance.running]
    if total is None or run.iteration > total:
        return word, ""
    left, pace = total - run.iteration, run.training.iteration_ms[-50:]
    eta = f", about {duration(left * float(np.nanmean(pace)) / 1000)} left" if len(pace) and word == "running" else ""
    return word, f"{run.iteration:,} of {total:,} steps{eta}"


def _sources(run: RunData) -> str:
    totals = {name: float(np.nansum(source.tokens)) for name, source in run.training.sources.items()}
    whole = sum(totals.values()) or 1.0
    return "; ".join(
        f"{name} {percent(total / whole)} %, {run.training.sources[name].epochs[-1]:.2f}"
        for name, total in totals.items()
    )


def _layout(run: RunData, layout: dict[str, object]) -> str:
    config = run.provenance.config
    names = {
        "TP": "model.tensor_model_parallel_size",
        "PP": "model.pipeline_model_parallel_size",
        "CP": "model.context_parallel_size",
    }
    degrees = [f"{short} {config[key]}" for short, key in names.items() if config.get(key, 1) != 1]
    size = layout.get("world_size")
    ranks = [] if size is None else ["1 rank" if size == 1 else f"{size} ranks"]
    return ", ".join([*ranks, *degrees]) or "n/a"


def configuration_table(runs: Sequence[RunData]) -> Table:
    """The keys in which runs differ, with each run's value."""
    keys = dict.fromkeys(key for run in runs for key in run.provenance.config)
    rows = []
    for key in keys:
        values = [run.provenance.config.get(key, "(absent)") for run in runs]
        if any(value != values[0] for value in values):
            rows.append((Cell(key), *(Cell(_plain(value)) for value in values)))
    return Table(("key", *(run.name for run in runs)), tuple(rows), words=1 + len(runs))


def _plain(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def provenance_table(run: RunData) -> Table:
    """Versions, data fingerprints and layout, from the newest checkpoint."""
    saved = run.provenance.checkpoint
    rows = [(Cell("folder"), Cell(str(run.folder)))]
    for source, facts in _items((saved.get("mixture") or {}).get("sources")):
        told = facts if isinstance(facts, dict) else {}
        counts = ", ".join(
            f"{told[what]:,} {what}" for what in ("documents", "tokens") if isinstance(told.get(what), int)
        )
        rows.append((Cell(f"data: {source}"), Cell(f"{counts}; digest {told.get('digest', 'unknown')}")))
    for part in ("layout", "versions", "identity"):
        facts = ", ".join(f"{key} {_plain(value)}" for key, value in _items(saved.get(part)))
        rows += [(Cell(part), Cell(facts))] if facts else []
    return Table(("what", "value"), tuple(rows), words=2)


def _items(value: object) -> Iterable[tuple[str, object]]:
    return value.items() if isinstance(value, dict) else ()
