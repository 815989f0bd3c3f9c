"""Small corpora on disk, in which every token is another number, so that a token says where it came from."""

from collections.abc import Callable, Sequence
from itertools import count

import numpy as np
import pytest

from megacpt.data.tokens.indexed import IndexedDataset, write_dataset


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[int]], IndexedDataset]:
    """corpus(lengths): documents of these lengths; their tokens are 0, 1, 2, ... through the file."""
    folder, numbers = tmp_path_factory.mktemp("corpora"), count()

    def make(lengths: Sequence[int]) -> IndexedDataset:
        ends = np.cumsum(lengths, dtype=np.int64)
        prefix = folder / f"corpus{next(numbers)}"
        write_dataset(prefix, np.dtype(np.int32), (np.arange(e - n, e) for n, e in zip(lengths, ends, strict=True)))
        return IndexedDataset(prefix)

    return make
