"""A subset of a token dataset without a copy: ranked document numbers, and `SUBSET.json` that says of what.

The file is raw little-endian int64, or NumPy's format where the name ends in .npy. Documents come best first, so a
smaller subset is a prefix of a larger one.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacpt.data.scores.scores import map_values, write_values
from megacpt.data.tokens.indexed import IndexedDataset
from megacpt.errors import UserError
from megacpt.files import json_beside, read_as, write_json

FORMAT = "megacpt subset 1"
IDS = np.dtype("<i8")
AT_ONCE = 1 << 20


@dataclass(frozen=True)
class SubsetManifest:
    """What a subset holds.

    Attributes:
        documents, tokens: in the subset.
        order: "lowest", "highest" or "random"; `seed` is of the last.
        threshold: score of the last document taken; None at random.
        best: score of the first.
        dropped: documents left out before ranking: tail, unscored, empty; and the share that was asked for.
        scores: sha256, scorer and direction of the scores; None at random.
        dataset: digest, documents and tokens of the dataset that the numbers belong to.
        sha256: of the ids, in little-endian int64.
    """

    documents: int
    tokens: int
    order: str
    seed: int | None
    threshold: float | None
    best: float | None
    dropped: dict[str, Any]
    scores: dict[str, Any] | None
    dataset: dict[str, Any]
    sha256: str
    megacpt_version: str
    format: str = FORMAT


@dataclass(frozen=True)
class Subset:
    """Ranked document numbers int64 [documents], mapped from the file, with the tokens that they hold."""

    ids: np.ndarray
    tokens: int
    manifest: SubsetManifest


def sha256_of_ids(ids: np.ndarray) -> str:
    """Hex digest of ids as raw little-endian bytes."""
    return hashlib.sha256(np.ascontiguousarray(ids, dtype=IDS).data).hexdigest()


def write_subset(path: Path, ids: np.ndarray, manifest: SubsetManifest) -> None:
    """Write both files, the ids last: where they are, their manifest is."""
    write_json(json_beside(path), asdict(manifest))
    write_values(path, ids.astype(IDS, copy=False))


def read_manifest(path: Path) -> SubsetManifest:
    """The manifest of a subset.

    Raises:
        UserError: it is missing, or is no such manifest.
    """
    place = json_beside(path)
    try:
        manifest = read_as(SubsetManifest, place, FORMAT)
        if not isinstance(manifest.dataset.get("digest"), str):
            raise ValueError("'dataset' has no digest")
        return manifest
    except FileNotFoundError as error:
        raise UserError(
            f"{place}: no such file, which says what {path.name} is a subset of; run tools/select_subset.py"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{place}: not a manifest of a subset ({error}); run tools/select_subset.py again") from error


def open_subset(path: str | Path, dataset: IndexedDataset, tokens: int | None = None) -> Subset:
    """Map a subset of `dataset`, or the shortest prefix of it that holds at least `tokens`.

    Every id is looked at once, in bounded memory: a byte per document of the dataset.

    Raises:
        UserError: a subset of another corpus; ids out of range or repeated; not the documents, tokens or order that
            its manifest says; or fewer tokens than were asked for.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of document numbers; run tools/select_subset.py")
    if manifest.dataset["digest"] != dataset.digest():
        raise UserError(f"{path}: a subset of another corpus than {dataset.prefix}; select from this dataset")
    ids = map_values(path, IDS)
    _check_ids(path, ids, len(dataset))
    held = sum(int(dataset.lengths[part].sum()) for part in _parts(ids))
    if len(ids) != manifest.documents or held != manifest.tokens:
        raise UserError(
            f"{path}: {len(ids):,} documents of {held:,} tokens, but {json_beside(path).name} says "
            f"{manifest.documents:,} of {manifest.tokens:,}; run tools/select_subset.py again"
        )
    if sha256_of_ids(ids) != manifest.sha256:
        raise UserError(
            f"{path}: not the ranking that {json_beside(path).name} describes; run tools/select_subset.py again"
        )
    if tokens is None:
        return Subset(ids, held, manifest)
    if not 0 < tokens <= held:
        raise UserError(
            f"{path}: {tokens:,} tokens cannot be taken of a subset that holds {held:,}; select a larger one"
        )
    count, taken = _prefix(ids, dataset.lengths, tokens)
    return Subset(ids[:count], taken, manifest)


def _parts(ids: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(ids), AT_ONCE):
        yield np.asarray(ids[start : start + AT_ONCE])


def _check_ids(path: Path, ids: np.ndarray, documents: int) -> None:
    seen = np.zeros(documents, dtype=bool)
    for number, part in enumerate(_parts(ids)):
        wrong = (part < 0) | (part >= documents)
        if wrong.any():
            place = int(wrong.argmax())
            raise UserError(
                f"{path}: entry {number * AT_ONCE + place:,} is document {int(part[place])}, but the "
                f"dataset has {documents:,}; run tools/select_subset.py again"
            )
        seen[part] = True
    if np.count_nonzero(seen) == len(ids):
        return
    order = np.argsort(ids, kind="stable")
    repeated = order[1:][ids[order[1:]] == ids[order[:-1]]]
    place = int(repeated.min())
    raise UserError(f"{path}: entry {place:,} repeats document {int(ids[place]):,}; run tools/select_subset.py again")


def _prefix(ids: np.ndarray, lengths: np.ndarray, tokens: int) -> tuple[int, int]:
    """As `selection.shortest_prefix`, without the lengths of all documents at once."""
    count = taken = 0
    for part in _parts(ids):
        ends = taken + np.cumsum(lengths[part], dtype=np.int64)
        inside = int(np.searchsorted(ends, tokens, side="left"))
        if inside < len(part):
            return count + inside + 1, int(ends[inside])
        count, taken = count + len(part), int(ends[-1])
    return count, taken
