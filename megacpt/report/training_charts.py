"""Charts of training: loss, sources, learning rate, speed; and of what became of the weights."""

from collections.abc import Callable, Sequence

import numpy as np

from megacpt.eval.stability import Floats
from megacpt.report.axes import picked, smoothed, thinned
from megacpt.report.chart import POINTS_MOST, Chart, Finding, HeatMap, Level, LineChart, Series
from megacpt.report.heat import on_one_scale
from megacpt.report.run import RunData, WeightUpdates
from megacpt.report.words import counted, percent, tokens_text, value_text

Coloured = tuple[RunData, int]
SHARE_BINS = 60
SMOOTH_FROM = 80
COLUMNS_MOST = 120
"""Of a heat map: more would be narrower than can be seen."""
LAYER_LABEL = "layer (0 is the input's)"


def training_charts(runs: Sequence[Coloured]) -> list[Chart]:
    """Loss of all runs; loss and share by source of the first run of each colour; learning rate, norm, throughput."""
    trained = [(run, colour) for run, colour in runs if len(run.training.tokens)]
    if not trained:
        return []
    charts: list[Chart] = []
    if len(trained) > 1:
        charts.append(_of_all("Training loss", "nats per token", trained, "loss", value_text, _fall))
    for run, _ in first_of_each_colour(trained):
        of = f" of {run.name}" if len(trained) > 1 else ""
        charts += [_loss_by_source(run, of), _share_by_source(run, of)]
    charts.append(_of_all("Learning rate", "learning rate", trained, "learning_rate", _small, _peak))
    charts.append(_of_all("Gradient norm before clipping", "norm", trained, "grad_norm", value_text, _middle))
    charts.append(_of_all("Throughput", "tokens per second, all ranks", trained, "tokens_per_second", counted, _speed))
    return charts


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"


def _of_all(
    title: str,
    unit: str,
    runs: Sequence[Coloured],
    field: str,
    write: Callable[[float], str],
    tell: Callable[[RunData, Floats], str],
) -> LineChart:
    series, findings = [], []
    alone = len(runs) == 1
    for run, colour in runs:
        values: Floats = getattr(run.training, field)
        x, label = run.training.tokens, "" if alone else run.name
        noisy = field != "learning_rate"
        series += _calm(x, values, colour, label) if noisy else [_plain(x, values, colour, label)]
        findings.append(Finding(tell(run, values), colour, "" if alone else run.name))
    return LineChart(title, tuple(findings), unit, tuple(series), write)


def _calm(x: Floats, y: Floats, colour: int, label: str) -> list[Series]:
    """A long noisy line as itself, faint, and its running mean."""
    if len(y) < SMOOTH_FROM:
        return [_plain(x, y, colour, label)]
    return [Series(*thinned(x, y), colour, "", faint=True), _plain(x, smoothed(y), colour, label)]


def _plain(x: Floats, y: Floats, colour: int, label: str) -> Series:
    return Series(*thinned(x, y), colour, label, dashed=colour >= 4)


def _fall(run: RunData, values: Floats) -> str:
    return f"From {value_text(values[0])} to {value_text(values[-1])} nats per token."


def _peak(run: RunData, values: Floats) -> str:
    top = int(np.nanargmax(values)) if np.isfinite(values).any() else 0
    where = tokens_text(run.training.tokens[top])
    return f"Highest {_small(values[top])} at {where}, last {_small(values[-1])}."


def _middle(run: RunData, values: Floats) -> str:
    return f"Median {value_text(float(np.nanmedian(values)))}, highest {value_text(float(np.nanmax(values)))}."


def _speed(run: RunData, values: Floats) -> str:
    mfu = run.training.mfu
    use = f", MFU {percent(float(np.nanmedian(mfu)))} %" if np.isfinite(mfu).any() else ""
    return f"Median {counted(float(np.nanmedian(values)))} tokens/s{use}."


def _loss_by_source(run: RunData, of: str) -> LineChart:
    training = run.training
    series, falls = [], []
    for colour, (name, source) in enumerate(training.sources.items()):
        known = np.isfinite(source.loss)
        y = source.loss[known]
        series += _calm(training.tokens[known], y, colour, name)
        if len(y):
            falls.append(f"{name} {value_text(y[0])} to {value_text(y[-1])}")
    finding = Finding(f"First and last interval: {', '.join(falls)}.")
    return LineChart(f"Training loss by source{of}", (finding,), "nats per token", tuple(series), value_text)


def _share_by_source(run: RunData, of: str) -> LineChart:
    """Stacked shares of the tokens of equal stretches of training."""
    training = run.training
    names = list(training.sources)
    tokens = np.nan_to_num(np.array([training.sources[name].tokens for name in names]).T)
    starts = np.unique(np.linspace(0, len(tokens), min(SHARE_BINS, len(tokens)), endpoint=False).astype(np.int64))
    sums = np.add.reduceat(tokens, starts)
    shares = sums / np.maximum(sums.sum(1, keepdims=True), 1)
    shares = np.concatenate([shares[:1], shares])
    x = np.concatenate([[0.0], training.tokens[[*(starts[1:] - 1), len(tokens) - 1]]])
    tops = np.cumsum(shares, 1)
    series = tuple(
        Series(x, tops[:, n], n, name, tops[:, n] - shares[:, n], tops[:, n], filled=True)
        for n, name in enumerate(names)
    )
    whole = tokens.sum(0) / max(1.0, tokens.sum())
    told = [
        f"{name} {percent(whole[n])} % ({training.sources[name].epochs[-1]:.2f} epochs)" for n, name in enumerate(names)
    ]
    finding = Finding(f"Of all tokens: {', '.join(told)}.")
    return LineChart(f"Token share by source{of}", (finding,), "% of the tokens", series, percent, y_range=(0.0, 1.0))


def first_of_each_colour(runs: Sequence[Coloured]) -> list[Coloured]:
    """One run for each arm: seeds of an arm look alike where a chart is of one run."""
    return list({colour: (run, colour) for run, colour in reversed(runs)}.values())[::-1]


def weight_charts(runs: Sequence[Coloured]) -> list[Chart]:
    """How far which layers moved, and the gradient probe, by arm; bottom against top, all runs."""
    updated = [(run, colour, run.updates) for run, colour in runs if run.updates is not None]
    alone = len(runs) == 1
    firsts = [(run, "" if alone else f" of {run.name}") for run, _ in first_of_each_colour(runs)]
    charts: list[Chart] = []
    charts += on_one_scale([_update_map(run.updates, of) for run, of in firsts if run.updates is not None])
    if updated:
        charts.append(_ratio(updated, alone=alone))
    charts += on_one_scale([_probe_map(run, of) for run, of in firsts if run.probe is not None])
    return charts


def _update_map(updates: WeightUpdates, of: str) -> HeatMap:
    last = updates.mean[-1]
    told = "No value yet."
    if np.isfinite(last).any():
        most, least = int(np.nanargmax(last)), int(np.nanargmin(last))
        told = (
            f"At the end layer {updates.layers[most]} had moved most ({value_text(last[most])}), "
            f"layer {updates.layers[least]} least ({value_text(last[least])})."
        )
    at = picked(len(updates.tokens), COLUMNS_MOST)
    return HeatMap(
        f"Weight update by layer{of}", (Finding(told),), LAYER_LABEL, "mean |w\u2212w\u2080| / |w\u2080|",
        updates.tokens[at], tuple(map(str, updates.layers)), updates.mean[at], value_text,
    )  # fmt: skip


def _ratio(updated: Sequence[tuple[RunData, int, WeightUpdates]], *, alone: bool) -> LineChart:
    series, findings = [], []
    for run, colour, updates in updated:
        name = "" if alone else run.name
        series.append(
            Series(
                updates.tokens,
                updates.ratio_mean,
                colour,
                name or "mean ratio",
                points=len(updates.tokens) <= POINTS_MOST,
            )
        )
        if alone:
            series.append(
                Series(
                    updates.tokens,
                    updates.ratio_norm,
                    1,
                    "norm ratio",
                    points=len(updates.tokens) <= POINTS_MOST,
                    dashed=True,
                )
            )
        findings.append(Finding(_ratio_told(updates), colour, name))
    compared = updated[0][2].compared
    title = "The bottom layer's update over the top layer's"
    if compared > 1:
        title = f"The bottom {compared} layers' update over the top {compared}'s"
    return LineChart(title, tuple(findings), "ratio", tuple(series), value_text, (Level(1.0, "even"),))


def _ratio_told(updates: WeightUpdates) -> str:
    known = np.flatnonzero(np.isfinite(updates.ratio_mean))
    if not len(known):
        return "No value yet."
    first, last = known[0], known[-1]
    top = known[int(np.argmax(updates.ratio_mean[known]))]
    return (
        f"{value_text(updates.ratio_mean[first])} at {tokens_text(updates.tokens[first])}, highest "
        f"{value_text(updates.ratio_mean[top])} at {tokens_text(updates.tokens[top])}, "
        f"{value_text(updates.ratio_mean[last])} at the end."
    )


def _probe_map(run: RunData, of: str) -> HeatMap:
    probe = run.probe
    assert probe is not None
    known = probe.cosine[np.isfinite(probe.cosine).any(1)]  # frozen layers have no gradient, and no cosine
    told = "No value yet."
    if len(known):
        first, last = (value_text(float(np.nanmean(known[at]))) for at in (0, -1))
        told = f"Mean cosine {first} at first, {last} at last; below zero they pull apart."
    at = picked(len(probe.tokens), COLUMNS_MOST)
    return HeatMap(
        f"Domain gradient against general gradient{of}", (Finding(told),), LAYER_LABEL, "cosine",
        probe.tokens[at], tuple(map(str, probe.layers)), probe.cosine[at], value_text, diverging=True,
    )  # fmt: skip
