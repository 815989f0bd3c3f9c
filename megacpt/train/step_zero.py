"""The validation of step 0, sample by sample, kept in the run's folder: what later ones are paired with, after a resume
too."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megacpt.data.samples.blended import EvalSet
from megacpt.errors import UserError
from megacpt.eval.results import Base
from megacpt.eval.validation import Validation
from megacpt.files import read_json, write_text

FILE = "validation_step0.json"
FORMAT = "megacpt validation 1"


@dataclass
class StepZero:
    """On the first rank alone.

    Attributes:
        sets: by name of the set, the digest of its dataset and its samples' sums (float64 [n, 3], as `Validation`'s).
    """

    path: Path
    sets: dict[str, tuple[str, np.ndarray]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, *, resumes: bool) -> "StepZero":
        """What the run kept; nothing where it begins anew, or never validated at step 0.

        Raises:
            UserError: the file is damaged.
        """
        path = folder / FILE
        if not resumes:
            path.unlink(missing_ok=True)  # of another run that once lived here
        try:
            found = read_json(path, FORMAT)
            return cls(path, {name: _kept(entry) for name, entry in found["sets"].items()})
        except FileNotFoundError:
            return cls(path)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: damaged ({error!r}); remove it to go on without pairs with step 0") from error

    def keep(self, results: dict[str, tuple[EvalSet, Validation]]) -> None:
        """Write the results of step 0.

        Raises:
            DiskError: they cannot be written.
        """
        self.sets = {name: (of.stream.corpus.digest, result.samples) for name, (of, result) in results.items()}
        sets = {name: {"digest": digest, "samples": part.tolist()} for name, (digest, part) in self.sets.items()}
        write_text(self.path, json.dumps({"format": FORMAT, "sets": sets}) + "\n")

    def base(self, name: str, eval_set: EvalSet) -> Base | None:
        """The samples of step 0; None where there are none, or the set's dataset has changed since.

        A set that `eval.iters` has made longer or shorter begins with the same samples: pairs are of those.
        """
        digest, samples = self.sets.get(name, ("", None))
        if samples is None or digest != eval_set.stream.corpus.digest:
            return None
        measures = Validation(samples).measures().values()
        return {
            m.name: dict(zip(m.keys, zip(m.numerators, m.denominators, strict=True), strict=True)) for m in measures
        }


def _kept(entry: dict[str, Any]) -> tuple[str, np.ndarray]:
    samples = np.array(entry["samples"], dtype=np.float64)
    if samples.ndim != 2 or samples.shape[1] != 3:
        raise ValueError(f"samples of shape {samples.shape}")
    return str(entry["digest"]), samples
