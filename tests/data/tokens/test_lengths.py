from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.tokens import indexed
from megacpt.data.tokens.lengths import LengthStatistics, length_statistics


@given(st.lists(st.integers(0, 5) | st.integers(0, 2**31 - 1), min_size=1, max_size=60), st.integers(1, 10))
def test_statistics_are_those_of_the_sorted_lengths(values, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed, "BLOCK", at_once)
        found = length_statistics(np.array(values, dtype=np.int32))
    ordered = sorted(values)
    assert (found.min, found.max) == (ordered[0], ordered[-1])
    assert found.mean == pytest.approx(sum(values) / len(values), abs=1e-3)
    for share, value in ((50, found.median), (90, found.p90), (99, found.p99)):
        assert value == ordered[ceil(share * len(values) / 100) - 1]
    assert sum(found.histogram.values()) == len(values)
    for name, count in found.histogram.items():
        low = int(name)
        assert count == sum(low <= value < 2 * low if low else value == 0 for value in values)


def test_no_documents():
    assert length_statistics(np.empty(0, dtype=np.int32)) == LengthStatistics()
