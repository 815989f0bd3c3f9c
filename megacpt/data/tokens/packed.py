"""Ids of texts, held in as few bytes each as they take until they are written: a long document has many."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

NARROW = (np.dtype(np.uint8), np.dtype(np.uint16))


@dataclass(frozen=True)
class Packed:
    """Ids end to end.

    Attributes:
        parts: ids [some] each, in `dtype` or one of NARROW.
        dtype: that of the dataset.
    """

    parts: tuple[np.ndarray, ...]
    dtype: np.dtype

    def arrays(self, keep: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Ids [some] in the dataset's dtype: all, or those of `keep`, bool [ids]."""
        begin = 0
        for part in self.parts:
            end = begin + len(part)
            kept = part if keep is None else part[keep[begin:end]]
            yield kept.astype(self.dtype, copy=False)
            begin = end


def narrowed(ids: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Ids [some], none negative, in the narrowest of NARROW and `dtype` that holds them."""
    most = ids.max(initial=0)
    fits = (narrow for narrow in NARROW if narrow.itemsize < dtype.itemsize and most <= np.iinfo(narrow).max)
    return ids.astype(next(fits, dtype))
