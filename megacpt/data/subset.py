"""Temporary."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megacpt.data.indexed import IndexedDataset


@dataclass(frozen=True)
class Subset:
    ids: np.ndarray
    tokens: int
    manifest: dict[str, Any]


def open_subset(path: str, dataset: IndexedDataset, tokens: int | None) -> Subset:
    ids = np.fromfile(path, "<i8")
    ends = np.cumsum(dataset.lengths[ids], dtype=np.int64)
    if tokens is not None:
        ids = ids[: int(np.searchsorted(ends, tokens)) + 1]
    return Subset(ids, int(dataset.lengths[ids].sum()), {})
