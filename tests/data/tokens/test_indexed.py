import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder as MegatronBuilder

from megacpt.data.tokens.indexed import (
    HEADER,
    MAGIC,
    VERSION,
    IndexedDataset,
    bin_path,
    idx_path,
    token_dtype,
    write_dataset,
    write_index,
)
from megacpt.errors import UserError

DTYPES = [np.uint16, np.int32]
documents_of_tokens = st.lists(st.lists(st.integers(0, 65_499), max_size=9), min_size=1, max_size=12)


def write_idx(prefix, lengths, pointers, documents, magic=MAGIC, version=VERSION, code=8):
    """An index written field by field, right or wrong."""
    head = HEADER.pack(magic, version, code, len(lengths), len(documents))
    arrays = np.array(lengths, "<i4"), np.array(pointers, "<i8"), np.array(documents, "<i8")
    idx_path(prefix).write_bytes(head + b"".join(array.tobytes() for array in arrays))


@pytest.fixture
def prefix(tmp_path) -> Path:
    """Two documents of three and two tokens."""
    path = tmp_path / "a.b"
    write_dataset(path, np.dtype(np.uint16), [np.array([1, 2, 3]), np.array([4, 5])])
    return path


@pytest.mark.parametrize("size", [2, 65_499, 65_500, 128_256])
def test_token_dtype_is_megatrons(size):
    assert token_dtype(size) == np.dtype(DType.optimal_dtype(size))


@settings(max_examples=40, deadline=None)
@given(documents=documents_of_tokens, dtype=st.sampled_from(DTYPES))
def test_our_datasets_are_megatrons_bytes(tmp_path_factory, documents, dtype):
    folder = tmp_path_factory.mktemp("write")
    write_dataset(folder / "ours", np.dtype(dtype), [np.array(d, dtype) for d in documents])
    builder = MegatronBuilder(str(bin_path(folder / "theirs")), dtype=dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(idx_path(folder / "theirs")))
    for path in (bin_path, idx_path):
        assert path(folder / "ours").read_bytes() == path(folder / "theirs").read_bytes()


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 65_499), min_size=1, max_size=5), max_size=3), max_size=8),
    dtype=st.sampled_from(DTYPES),
)
def test_reads_documents_of_any_number_of_sequences(tmp_path_factory, documents, dtype):
    """Megatron's builder writes; a document may have no sequence (an empty text) or several (sentences)."""
    prefix = tmp_path_factory.mktemp("read") / "theirs"
    builder = MegatronBuilder(str(bin_path(prefix)), dtype=dtype)
    flat = [[token for sequence in document for token in sequence] for document in documents]
    for tokens, document in zip(flat, documents, strict=True):
        builder.add_document(tokens, [len(sequence) for sequence in document])
    builder.finalize(str(idx_path(prefix)))

    ours = IndexedDataset(prefix)
    assert [ours.read(i).tolist() for i in range(len(ours))] == flat
    assert ours.lengths.tolist() == [len(tokens) for tokens in flat]
    assert ours.tokens == sum(map(len, flat))


@settings(max_examples=40, deadline=None)
@given(documents=documents_of_tokens.filter(any), dtype=st.sampled_from(DTYPES))
def test_megatron_reads_what_we_write(tmp_path_factory, documents, dtype):
    prefix = tmp_path_factory.mktemp("theirs") / "ours"
    write_dataset(prefix, np.dtype(dtype), [np.array(d, dtype) for d in documents])
    theirs = MegatronDataset(str(prefix))
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_ranges_inside_a_document(tmp_path_factory, data):
    tokens = data.draw(st.lists(st.integers(0, 100), min_size=1, max_size=20))
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    prefix = tmp_path_factory.mktemp("range") / "x"
    write_dataset(prefix, np.dtype(np.uint16), [np.array([7]), np.array(tokens), np.array([8])])
    assert IndexedDataset(prefix).read(1, start, stop).tolist() == tokens[start:stop]


@pytest.mark.parametrize("bounds", [(0, 2, 1), (0, -1, 2), (0, 0, 4), (2, 0, 1), (-1, 0, 1)])
def test_reading_outside_a_document_is_an_index_error(prefix, bounds):
    with pytest.raises(IndexError):
        IndexedDataset(prefix).read(*bounds)


def test_a_dataset_without_documents_is_read(tmp_path):
    write_dataset(tmp_path / "x", np.dtype(np.uint16), [])
    assert len(IndexedDataset(tmp_path / "x")) == 0


@pytest.mark.parametrize("path", [bin_path, idx_path])
def test_missing_file(prefix, path):
    path(prefix).unlink()
    with pytest.raises(UserError, match=rf"{path(prefix).name}: no such file"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("path", [bin_path, idx_path])
def test_a_prefix_with_its_suffix(prefix, path):
    with pytest.raises(UserError, match="give the prefix without the suffix"):
        IndexedDataset(path(prefix))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:20], "not a Megatron index"),
        (lambda raw: b"", "not a Megatron index"),
        (lambda raw: b"PK\x03\x04" + raw[4:], "not a Megatron index"),
        (lambda raw: raw[:9] + struct.pack("<Q", 2) + raw[17:], "index version 2, dtype code 8 are unknown"),
        (lambda raw: raw[:17] + b"\x0b" + raw[18:], "dtype code 11"),
        (lambda raw: raw[:17] + b"\x07" + raw[18:], "holds float32 values"),
        (lambda raw: raw[:-1], "truncated"),
        (lambda raw: raw + b"\x00", "longer than it says"),
        (lambda raw: raw[:18] + struct.pack("<Q", 1 << 60) + raw[26:], "truncated"),
    ],
)
def test_damaged_index(prefix, change, message):
    path = idx_path(prefix)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("lengths", "pointers"),
    [
        ([3, 3], [0, 6]),
        ([-1, 2], [0, 6]),
        ([3, 2], [0, -2]),
        ([3, 2], [0, 5]),
        ([3, 2], [0, 1 << 40]),
        ([3, 2], [0, (1 << 63) - 2]),
    ],
)
def test_index_outside_the_tokens(prefix, lengths, pointers):
    write_idx(prefix, lengths, pointers, [0, 1, 2])
    with pytest.raises(UserError, match=r"a\.b\.bin: truncated or foreign: document [01] of 2"):
        IndexedDataset(prefix)


def test_truncated_tokens(prefix):
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes()[:-2])
    with pytest.raises(UserError, match=r"document 1 of 2 ends at byte 10, the file has 8"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("documents", [[], [0], [1, 2], [0, 1, 3], [0, 2, 1, 2]])
def test_boundaries_that_do_not_cover_the_sequences(prefix, documents):
    write_idx(prefix, [3, 2], [0, 6], documents)
    with pytest.raises(UserError, match="document boundaries do not cover"):
        IndexedDataset(prefix)


def test_documents_of_scattered_sequences(prefix):
    write_idx(prefix, [3, 1], [0, 8], [0, 2])
    with pytest.raises(UserError, match="must lie back to back"):
        IndexedDataset(prefix)


def test_token_out_of_vocabulary_names_its_document(prefix):
    IndexedDataset(prefix).check_vocabulary(6)
    with pytest.raises(UserError, match=r"a\.b\.bin: document 1 holds token 5, but the vocabulary has 5"):
        IndexedDataset(prefix).check_vocabulary(5)


def test_negative_token(tmp_path):
    write_dataset(tmp_path / "x", np.dtype(np.int32), [np.array([1]), np.array([2, -3])])
    with pytest.raises(UserError, match="document 1 holds token -3"):
        IndexedDataset(tmp_path / "x").check_vocabulary(100)


def test_an_index_in_a_place_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be made"):
        write_index(tmp_path / "file" / "x", np.dtype(np.uint16), np.array([1]))
