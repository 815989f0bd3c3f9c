"""A run's folder as typed data: what it measured, what it was, how far it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megacpt.eval.stability import Curve, Floats, Gap, Integers, gap
from megacpt.report.folder import Provenance


class Change(NamedTuple):
    """A value minus the one at step 0, paired, and its 95 % interval (None where there is none)."""

    delta: float
    low: float | None
    high: float | None

    @property
    def significant(self) -> bool | None:
        """Whether the interval excludes zero; None without one."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Metric:
    """A measured ability over training.

    Attributes:
        kind: "set" (a named corpus), "task" or "suite".
        measure: "loss", "accuracy", "acc", "mean", ...
        suite: of a task, the suite it was run for.
        paired: iteration -> its difference from step 0, on the same items or, of several runs, run by run.
        runs: of how many this is the mean.
    """

    kind: str
    name: str
    measure: str
    suite: str | None
    curve: Curve
    paired: dict[int, Change]
    runs: int = 1

    @property
    def key(self) -> tuple[str, str, str]:
        """What two runs must share for their curves to be comparable."""
        return self.kind, self.name, self.measure

    @property
    def title(self) -> str:
        """Short, for headings and tables."""
        if self.kind == "set":
            return f"{self.name} loss" if self.measure == "loss" else f"{self.name} next-token accuracy"
        return f"{self.name} average" if self.kind == "suite" else f"{self.name} ({self.measure})"

    @property
    def heading(self) -> str:
        """The title at the beginning of a line; tasks and suites keep their own spelling."""
        return self.title[:1].upper() + self.title[1:] if self.kind == "set" else self.title

    @property
    def unit(self) -> str:
        """For the axis; says which way is better."""
        way = "higher is better" if self.curve.higher_is_better else "lower is better"
        return f"{'nats per token' if self.measure == 'loss' else 'fraction right'} ({way})"

    @property
    def gap(self) -> Gap | None:
        """The gap's numbers."""
        told = {at: change.significant for at, change in self.paired.items()}
        return gap(self.curve, {at: verdict for at, verdict in told.items() if verdict is not None})


@dataclass(frozen=True)
class Source:
    """One training source, float64 [n]: loss (NaN where an interval had none of it), tokens and passes so far."""

    loss: Floats
    tokens: Floats
    epochs: Floats


@dataclass(frozen=True)
class Training:
    """The training rows: int64 or float64 [n]."""

    iteration: Integers
    tokens: Floats
    loss: Floats
    learning_rate: Floats
    grad_norm: Floats
    tokens_per_second: Floats
    iteration_ms: Floats
    mfu: Floats
    sources: dict[str, Source]

    def epochs_at(self, tokens: float) -> dict[str, float]:
        """Passes over each source when so many tokens had been trained on, linear between rows."""
        if not len(self.tokens):
            return {}
        x = np.concatenate([[0.0], self.tokens])
        return {n: float(np.interp(tokens, x, np.concatenate([[0.0], s.epochs]))) for n, s in self.sources.items()}


@dataclass(frozen=True)
class WeightUpdates:
    """Relative weight update from the base.

    Attributes:
        layers: layer numbers [layers].
        mean, norm: mean |dw|/|w0| and ||dw||/||w0||, float64 [n, layers].
        ratio_mean, ratio_norm: bottom over top layers, float64 [n].
        compared: how many layers are "bottom" and "top".
    """

    tokens: Floats
    layers: list[int]
    mean: Floats
    norm: Floats
    ratio_mean: Floats
    ratio_norm: Floats
    compared: int


@dataclass(frozen=True)
class GradientProbe:
    """Cosine of the domain's and the general gradient by layer, float64 [n, layers]."""

    tokens: Floats
    layers: list[int]
    cosine: Floats


@dataclass(frozen=True)
class Suite:
    """A suite at one evaluation: its tasks' values (None of an absent one)."""

    name: str
    iteration: int
    tokens: float
    tasks: dict[str, float | None]
    absent: tuple[str, ...]


@dataclass(frozen=True)
class RunData:
    """Everything a report shows of one run; any part may be empty."""

    name: str
    folder: Path
    provenance: Provenance
    metrics: list[Metric]
    training: Training
    updates: WeightUpdates | None
    probe: GradientProbe | None
    suites: list[Suite]
    notices: list[str]

    @property
    def iteration(self) -> int:
        """The last step that a row speaks of."""
        last = [int(m.curve.iteration[-1]) for m in self.metrics if len(m.curve)]
        return max([*last, *self.training.iteration[-1:].tolist()], default=0)

    @property
    def tokens(self) -> float:
        """The most tokens that a row speaks of."""
        last = [float(m.curve.tokens[-1]) for m in self.metrics if len(m.curve)]
        return max([*last, *self.training.tokens[-1:].tolist()], default=0.0)

    @property
    def ended(self) -> bool:
        """Whether it trained to the end of its plan, as far as the folder can say."""
        return self.provenance.last_iteration is not None and self.iteration >= self.provenance.last_iteration

    @property
    def domain(self) -> str | None:
        """The source with the most tokens: what the run is trained on in the first place."""
        totals = {name: float(np.nansum(source.tokens)) for name, source in self.training.sources.items()}
        return max(totals, key=totals.__getitem__, default=None)

    def metric(self, key: tuple[str, str, str]) -> Metric | None:
        """The metric of that name, if this run has it."""
        return next((metric for metric in self.metrics if metric.key == key), None)
