"""metrics.jsonl as rows that know their line, less what a restart wrote anew."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megacpt.errors import UserError
from megacpt.eval.stability import Floats

MARKS = (
    ("validation", "validation"),
    ("task", "task"),
    ("suite", "suite"),
    ("weight_update", "weight_update"),
    ("gradient_probe", "gradient_probe"),
    ("guard", "guard"),
    ("evaluation_error", "failure"),
    ("lm_loss", "training"),
)
"""The key by which a row's kind is known, first match first (a task row names its suite too)."""


class NotYet(UserError):
    """There is nothing to read, which in a run that has just begun will change."""


class Row(NamedTuple):
    """A row of metrics.jsonl and its place, for sentences about it."""

    place: str
    kind: str
    values: Mapping[str, Any]

    def get[T](self, key: str, read: Callable[[Any], T]) -> T:
        """The value of a key that this kind of row must have, read as T.

        Raises:
            UserError: it is missing or something else.
        """
        try:
            return read(self.values[key])
        except (KeyError, TypeError, ValueError) as error:
            why = "is missing" if isinstance(error, KeyError) else f"is {str(self.values.get(key))[:40]!r}"
            raise UserError(f"{self.place}: `{key}` of a {self.kind} row {why}; correct or remove the line") from error

    @property
    def iteration(self) -> int:
        """Steps trained when the row was written."""
        return self.get("iteration", int)

    @property
    def tokens(self) -> float:
        """Target tokens trained on when the row was written."""
        return self.get("consumed_tokens", float)


def optional_number(value: object) -> float:
    """A float; NaN of null."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def column(rows: Iterable[Row], key: str) -> Floats:
    """A key of all rows, float64 [n], NaN where it is null or absent."""
    return np.array([row.get(key, optional_number) if key in row.values else math.nan for row in rows], np.float64)


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics file in the order of training. Rows of unknown kinds are left out.

    A last line without its end is being written, or was cut off by a kill, and does not count. Where iterations go
    back, a run was resumed: what it then wrote stands for everything from there on.

    Raises:
        UserError: there is no such file, or a line is damaged.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise NotYet(
            f"{path.parent}: no metrics.jsonl in it; give a run's folder, the one that save.dir named"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    rows: list[Row] = []
    reached = 0
    for number, line in enumerate(text.split(b"\n")[:-1], 1):
        if not line.strip():
            continue
        row = _parse(f"{path}: line {number}", line)
        if row.iteration < reached:
            # A guard's verdict stays: it may be the very reason for going back.
            rows = [earlier for earlier in rows if earlier.iteration < row.iteration or earlier.kind == "guard"]
        reached = row.iteration
        rows.append(row)
    return [row for row in rows if row.kind]


def _parse(place: str, line: bytes) -> Row:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is damaged ({error}); correct or remove it") from error
    if not isinstance(values, dict):
        raise UserError(f"{place} is no JSON object; correct or remove it")
    return Row(place, next((kind for key, kind in MARKS if key in values), ""), values)


def latest_of_each_step(rows: Iterable[Row]) -> list[Row]:
    """One row an iteration, the last one written."""
    return list({row.iteration: row for row in rows}.values())
