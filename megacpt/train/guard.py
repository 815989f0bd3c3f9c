"""What an evaluation decides: whether the model has forgotten too much, and whether it is the best so far.

Decisions are made on the first rank, from the rows of metrics.jsonl, and told to the others. A run that the guard ended
keeps `guard.json` in its folder: the same command again then says why, instead of training on.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from megacpt.config.tree import Best, Config, Guard
from megacpt.errors import UserError
from megacpt.files import write_json
from megacpt.train.checkpoint import iteration_folder
from megacpt.train.rows import Row

RECORD = "guard.json"


class Score(NamedTuple):
    """The value of a metric, and which way is better."""

    value: float
    higher_is_better: bool


class BestSoFar(NamedTuple):
    """The evaluation with the largest weighted sum of metrics, among those with a checkpoint."""

    iteration: int
    criterion: float


@dataclass(frozen=True)
class Drop:
    """How much worse a metric is than at step 0, in its own unit; negative where it is better."""

    metric: str
    drop: float
    max_drop: float
    action: Literal["warn", "stop", "rollback"]
    higher_is_better: bool
    base: float
    value: float

    def row(self) -> Row:
        """Its row of metrics.jsonl, without the common fields."""
        return {"guard": self.metric} | {name: value for name, value in asdict(self).items() if name != "metric"}


@dataclass(frozen=True)
class Ended:
    """How the guard ended a run.

    Attributes:
        iteration: the evaluation that ended it.
        resumes_at: the checkpoint that the tracker names since: of that iteration, or after a rollback the best.
    """

    iteration: int
    resumes_at: int
    drop: Drop

    def __str__(self) -> str:
        change = "fallen" if self.drop.higher_is_better else "risen"
        back = (
            "" if self.resumes_at == self.iteration else f", and went back to the best, iteration {self.resumes_at:,}"
        )
        return (
            f"the guard ended this run after iteration {self.iteration:,}{back}: {self.drop.metric} had {change} by "
            f"{self.drop.drop:.4f} from {self.drop.base:.4f}, allowed are {self.drop.max_drop:g}"
        )


@dataclass(frozen=True)
class Verdict:
    """What follows from an evaluation.

    Attributes:
        drop: where it is larger than allowed.
        saves: this is the best evaluation so far, and its checkpoint is to be kept.
        ends_on: the run ends, and this iteration's checkpoint is where the same command would go on.
    """

    drop: Drop | None = None
    saves: bool = False
    ends_on: int | None = None


@dataclass
class Watch:
    """The first rank's view of a run's evaluations; what it knows follows from metrics.jsonl and the checkpoints.

    Attributes:
        rows: every evaluation row of the run, as the log appends them.
    """

    guard: Guard | None
    criterion: Best | None
    rows: list[Row] = field(default_factory=list)
    best: BestSoFar | None = None

    def look_back(self, checkpoints: Path) -> None:
        """Find the best of the evaluations so far that have a checkpoint, when a run goes on."""
        iterations = sorted({row["iteration"] for row in self.rows} - {0})
        self.best = None
        for iteration in iterations:
            if iteration_folder(checkpoints, iteration).is_dir():
                self._consider(iteration)

    def judge(self, iteration: int) -> Verdict:
        """Look at the rows of `iteration`; a metric that is missing there, or at step 0, decides nothing."""
        drop = self._drop(iteration) if self.guard is not None else None
        action = drop.action if drop is not None else None
        if action == "rollback" and self.best is not None:
            return Verdict(drop, ends_on=self.best.iteration)
        if action in ("stop", "rollback"):
            return Verdict(drop, ends_on=iteration)
        return Verdict(drop, saves=iteration > 0 and self._consider(iteration))

    def _drop(self, iteration: int) -> Drop | None:
        assert self.guard is not None
        metric = self.guard.metric
        base, now = (scores(self.rows, at).get(metric) for at in (0, iteration))
        if iteration == 0 or base is None or now is None:
            return None
        drop = (base.value - now.value) * (1 if now.higher_is_better else -1)
        if drop <= self.guard.max_drop:
            return None
        guard = self.guard
        return Drop(metric, drop, guard.max_drop, guard.action, now.higher_is_better, base.value, now.value)

    def _consider(self, iteration: int) -> bool:
        if self.criterion is None:
            return False
        value = weighted_sum(self.criterion.weights, scores(self.rows, iteration))
        if value is None or (self.best is not None and value <= self.best.criterion):
            return False
        self.best = BestSoFar(iteration, value)
        return True


def scores(rows: Iterable[Row], iteration: int) -> dict[str, Score]:
    """Finite scores of an iteration, by the names of `guard.metric`."""
    found: dict[str, Score] = {}
    for row in rows:
        if row["iteration"] != iteration:
            continue
        if "validation" in row:
            for name in ("loss", "ppl", "accuracy", "bits_per_byte"):
                _note(found, f"validation/{row['validation']}/{name}", row.get(name), name == "accuracy")
        elif "task" in row:
            _note(found, f"task/{row['task']}/{row['metric']}", row["value"], row["higher_is_better"])
        elif "suite" in row:
            _note(found, f"suite/{row['suite']}/{row['metric']}", row["value"], True)
    return found


def _note(found: dict[str, Score], name: str, value: float | None, higher_is_better: bool) -> None:
    if value is not None and math.isfinite(value):
        found[name] = Score(value, higher_is_better)


def weighted_sum(weights: Mapping[str, float], found: Mapping[str, Score]) -> float | None:
    """The criterion of the best checkpoint; None where a metric is missing."""
    if not all(name in found for name in weights):
        return None
    return math.fsum(weight * found[name].value for name, weight in weights.items())


def record_end(folder: Path, ended: Ended) -> None:
    """Write guard.json into the run folder."""
    write_json(folder / RECORD, asdict(ended))


def read_end(config: Config, iteration: int) -> tuple[Ended | None, Sequence[str]]:
    """How the guard ended the run that resumes at `iteration`, if it did and still would; and what there is to say.

    Raises:
        UserError: guard.json is damaged.
    """
    path = Path(config.save.dir) / RECORD
    if not path.is_file():
        return None, ()
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        ended = Ended(record["iteration"], record["resumes_at"], Drop(**record["drop"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error!r}); remove it to go on from the newest checkpoint") from error
    if ended.resumes_at != iteration:
        return None, ()
    guard = config.guard
    if guard is None or guard.action == "warn" or guard.metric != ended.drop.metric:
        return None, (f"{ended}; goes on, for guard has changed",)
    if ended.drop.drop <= guard.max_drop:
        return None, (f"{ended}; goes on, for guard.max_drop is {guard.max_drop:g} now",)
    return ended, ()
