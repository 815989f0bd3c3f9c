"""A file of scores: one float32 per document, in the order of the index, and `SCORES.json` that says of what.

The file is raw little-endian, or NumPy's format where the name ends in .npy. An infinite score says that a document
has none (it holds no word); no score is NaN.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacpt.data.scores.overlap import EvalOverlap
from megacpt.data.tokens.indexed import IndexedDataset
from megacpt.data.tokens.manifest import Manifest
from megacpt.errors import UserError
from megacpt.files import atomic_write, json_beside, read_as, sha256_of, write_json

FORMAT = "megacpt scores 1"
DIRECTIONS = ("lower_is_better", "higher_is_better")


@dataclass(frozen=True)
class ScoresManifest:
    """What scores are of.

    Attributes:
        documents: how many there are; `unscored` of them are infinite.
        scorer: name ("kenlm", "dsir", "column:NAME"), model sha256, normalisation, reference, overlap.
        direction: one of DIRECTIONS.
        inputs, json_keys, filters: the text files that were scored, and which rows of them; or None:
        dataset: digest and tokenizer of the token dataset that was decoded and scored.
        sha256: of the scores, in little-endian float32.
    """

    documents: int
    unscored: int
    scorer: dict[str, Any]
    direction: str
    inputs: list[dict[str, Any]] | None
    json_keys: list[str] | None
    filters: dict[str, Any] | None
    dataset: dict[str, Any] | None
    dropped: dict[str, int]
    sha256: str
    megacpt_version: str
    format: str = FORMAT

    @property
    def axis_label(self) -> str:
        """What a score is, for a picture."""
        what = "perplexity" if self.scorer["name"] == "kenlm" else f"{self.scorer['name']} score"
        return f"{what} ({self.direction.replace('_', ' ')})"


@dataclass(frozen=True)
class Scores:
    """Scores float32 [documents], mapped from the file, and what they are of."""

    values: np.ndarray
    manifest: ScoresManifest


def write_scores(path: Path, values: np.ndarray, manifest: ScoresManifest) -> None:
    """Write both files, the scores last: where they are, their manifest is."""
    write_json(json_beside(path), asdict(manifest))
    write_values(path, values.astype("<f4", copy=False))


def read_manifest(path: Path) -> ScoresManifest:
    """The manifest of scores.

    Raises:
        UserError: it is missing, or is no such manifest.
    """
    place = json_beside(path)
    try:
        return _checked(read_as(ScoresManifest, place, FORMAT))
    except FileNotFoundError as error:
        raise UserError(f"{place}: no such file, which says what {path.name} scores; run tools/score.py") from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{place}: not a manifest of scores ({error}); run tools/score.py again") from error


def _checked(manifest: ScoresManifest) -> ScoresManifest:
    """Refuse, with a ValueError, a manifest that lacks what a selection asks it for."""
    if manifest.direction not in DIRECTIONS:
        raise ValueError(f"'direction' is not one of {', '.join(DIRECTIONS)}")
    try:
        str(manifest.scorer["name"])
        for entry in manifest.scorer.get("overlap", []):
            EvalOverlap(**entry)
    except (KeyError, TypeError) as error:
        raise ValueError("'scorer' lacks its name, or an overlap is not described") from error
    if any(not {"sha256", "bytes"} <= entry.keys() for entry in manifest.inputs or []):
        raise ValueError("'inputs' are not described by sha256 and bytes")
    if manifest.dataset is not None:
        digest, tokenizer = manifest.dataset.get("digest"), manifest.dataset.get("tokenizer")
        if not isinstance(digest, str) or not isinstance(tokenizer, dict) or "sha256" not in tokenizer:
            raise ValueError("'dataset' has no digest, or no tokenizer")
    return manifest


def open_scores(path: Path, dataset: IndexedDataset, made: Manifest | None) -> Scores:
    """Map scores of a dataset's documents.

    Args:
        made: the dataset's own manifest, by which scores of its text files are recognised.

    Raises:
        UserError: scores of another corpus, encoded by another tokenizer, of another length, altered, or NaN.
    """
    manifest = read_manifest(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of scores; run tools/score.py")
    _same_corpus(path, manifest, dataset, made)
    values = map_values(path, np.dtype("<f4"))
    if len(values) != len(dataset) or manifest.documents != len(dataset):
        raise UserError(
            f"{path}: {len(values):,} scores, but {dataset.prefix} has {len(dataset):,} documents; score this dataset"
        )
    if sha256_of_values(path, values) != manifest.sha256:
        raise UserError(f"{path}: not the scores that {json_beside(path).name} describes; run tools/score.py again")
    bad = np.isnan(values)
    if bad.any():
        raise UserError(
            f"{path}: the score of document {int(bad.argmax()):,} is not a number; run tools/score.py again"
        )
    return Scores(values, manifest)


def _same_corpus(path: Path, scores: ScoresManifest, dataset: IndexedDataset, made: Manifest | None) -> None:
    if scores.dataset is not None:
        if scores.dataset["digest"] == dataset.digest():
            return
        theirs = scores.dataset["tokenizer"]["sha256"]
        if made is not None and made.tokenizer.sha256 != theirs:
            raise UserError(
                f"{path}: scores of a dataset of another tokenizer (sha256 {theirs[:12]}) than {dataset.prefix} "
                f"({made.tokenizer.sha256[:12]}); score this dataset, or the text files that both were made from"
            )
        raise UserError(f"{path}: scores of another dataset than {dataset.prefix}; run tools/score.py on this one")
    if made is None:
        raise UserError(
            f"{dataset.prefix}.json: without the dataset's manifest nothing says that {path} scores its documents; "
            "score the dataset itself with tools/score.py --data"
        )
    scored = [(entry["sha256"], entry["bytes"]) for entry in scores.inputs or []]
    if scored != [(entry.sha256, entry.bytes) for entry in made.inputs]:
        raise UserError(f"{path}: scores of other text files than {dataset.prefix} was made from; score these files")
    if made.filters is None:
        raise UserError(
            f"{path}: scores of text files, but {dataset.prefix} is a selection or a merge, whose documents no run "
            "over text files gives; score it with tools/score.py --data"
        )
    filters, keys = asdict(made.filters), made.json_keys or [made.json_key]
    if scores.filters != filters or scores.json_keys != keys:
        raise UserError(
            f"{path}: scored rows filtered by {_spelled(scores.filters, scores.json_keys)}, but {dataset.prefix} has "
            f"those by {_spelled(filters, keys)}; score with the options of preprocessing"
        )


def _spelled(filters: dict[str, Any] | None, keys: list[str] | None) -> str:
    named = [f"{name}={value}" for name, value in (filters or {}).items()]
    return ", ".join([*named, f"json_keys={','.join(keys or [])}"])


def write_values(path: Path, values: np.ndarray) -> None:
    """Write a one-dimensional array as `map_values` reads it, atomically: raw, or .npy where the name ends so."""
    with atomic_write(path) as handle:
        if path.suffix == ".npy":
            np.save(handle, values)
        else:
            handle.write(np.ascontiguousarray(values).data)


def map_values(path: Path, dtype: np.dtype) -> np.ndarray:
    """A one-dimensional array mapped from a raw file, or from a .npy file.

    Raises:
        UserError: the file is cut short, or holds something else.
    """
    size = path.stat().st_size
    if path.suffix == ".npy":
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{path}: not a .npy file ({error}); write it again") from error
        if values.ndim != 1 or values.dtype != dtype:
            raise UserError(f"{path}: holds {values.dtype} of {values.ndim} dimensions, not a list of {dtype.name}")
        return values
    if size % dtype.itemsize:
        raise UserError(f"{path}: {size:,} bytes are no whole number of {dtype.name} values; write it again")
    return np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype)


def sha256_of_values(path: Path, values: np.ndarray) -> str:
    """Hex digest of the values as raw little-endian bytes, whichever the format of the file."""
    if path.suffix != ".npy":
        return sha256_of(path)
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
