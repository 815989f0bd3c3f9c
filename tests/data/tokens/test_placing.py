"""Tokens that wait for their places."""

from collections import Counter
from contextlib import closing

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megacpt.data.tokens.encode import EncodedBlock
from megacpt.data.tokens.packed import Packed, narrowed
from megacpt.data.tokens.placing import HeldTokens, Places
from megacpt.errors import DiskError

documents = st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=6)


def packed(ids: np.ndarray) -> Packed:
    """In parts of seven."""
    parts = [narrowed(ids[i : i + 7], ids.dtype) for i in range(0, len(ids), 7)]
    return Packed(tuple(parts), ids.dtype)


def block_of(lengths: list[int], first: int) -> EncodedBlock:
    """Two keys; the second has twice the tokens of the first."""
    sizes = np.array(lengths, np.int32)
    tokens = [np.arange(first, first + n * int(sizes.sum()), dtype=np.uint16) for n in (1, 2)]
    return EncodedBlock(
        [packed(ids) for ids in tokens], [sizes, 2 * sizes], [sizes.astype(np.int64)] * 2, Counter(), 0, 0
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(documents, max_size=5), st.booleans())
def test_kept_documents_lie_end_to_end(tmp_path, blocks, all_kept):
    files = (tmp_path / "0.bin", tmp_path / "1.bin")
    for path in files:
        path.write_bytes(b"")
    expected: list[list[int]] = [[], []]
    offsets = [0, 0]
    with closing(HeldTokens()) as held:
        kept = []
        for number, block in enumerate(blocks):
            made = block_of([length for length, _ in block], 100 * number)
            kept.append((made, np.array([all_kept or keep for _, keep in block], bool)))
            assert held.hold(made).tokens == []
        for made, keep in kept:
            held.write(Places(files, tuple(offsets), None if all_kept else keep))
            for key, (tokens, lengths) in enumerate(zip(made.tokens, made.lengths, strict=True)):
                ids = np.concatenate([np.empty(0, np.uint16), *tokens.arrays()])
                parts = np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []
                expected[key] += [t for part, yes in zip(parts, keep, strict=True) if yes for t in part.tolist()]
                offsets[key] = 2 * len(expected[key])
    for path, tokens in zip(files, expected, strict=True):
        assert np.fromfile(path, np.uint16).tolist() == tokens


@given(st.lists(st.integers(0, (1 << 31) - 1), max_size=5), st.sampled_from(["<u2", "<i4"]))
def test_ids_take_as_few_bytes_as_they_need(ids, name):
    dtype = np.dtype(name)
    array = np.minimum(np.array(ids, np.int32), 65_535 if dtype.itemsize == 2 else (1 << 31) - 1)
    held = narrowed(array, dtype)
    assert held.itemsize == next(size for size in (1, 2, 4) if array.max(initial=0) < 1 << 8 * size)
    (back,) = Packed((held,), dtype).arrays()
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, array)


def test_a_full_disk_is_named():
    with closing(HeldTokens()) as held:
        held.hold(block_of([3], 0))
        with pytest.raises(DiskError, match=r"^/dev/full: the disk is full"):
            held.write(Places(("/dev/full", "/dev/full"), (0, 0)))
