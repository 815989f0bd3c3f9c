"""Rows of a Parquet file, so many at a time that their text is about BLOCK_BYTES, however long they are."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megacpt.data.text import long_string

ROWS = 512
"""Rows that are decoded at once at most."""
BATCH = 8
"""Blocks that are decoded at once on average; in Arrow's form they take little more than their text."""


def row_blocks(table: Any, keys: Sequence[str], first: int, stop: int, most: int) -> Iterator[tuple[int, int, Any]]:
    """(row, how many, {key: values}) of rows [first, stop) of a pyarrow ParquetFile, without keys that it lacks.

    Args:
        most: bytes of text; a block ends with the row that reaches them.

    Raises:
        pyarrow.ArrowException: the file is damaged.
    """
    present = [key for key in keys if key in table.schema_arrow.names]
    groups, row = _row_groups(table.metadata, first, stop)
    size = _rows_at_once(table.metadata, groups, present, BATCH * most)
    for batch in _batches(table, groups, present, size):
        begin, end = max(0, first - row), min(batch.num_rows, stop - row)
        while begin < end:
            rows = _rows_within(batch.slice(begin, end - begin), most)
            yield row + begin, rows, {key: _values(batch.column(key).slice(begin, rows)) for key in present}
            begin += rows
        row += batch.num_rows


def _batches(table: Any, groups: Sequence[int], keys: Sequence[str], rows: int) -> Iterator[Any]:
    """Rows of row groups, so many at a time."""
    import pyarrow

    for group in groups:
        left = table.metadata.row_group(group).num_rows
        batches = table.iter_batches(batch_size=rows, row_groups=[group], columns=keys)
        for batch in batches:
            left -= batch.num_rows
            if not left:
                batches.close()
            # Of a very long value the reader holds pages as well until it is closed, and Arrow whatever it let go of.
            if batch.nbytes >= long_string.LONG:
                pyarrow.default_memory_pool().release_unused()
            yield batch


def _row_groups(metadata: Any, first: int, stop: int) -> tuple[list[int], int]:
    """The row groups of a Parquet file that hold rows [first, stop), and the row at which the first of them begins."""
    groups: list[int] = []
    row = begins = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < stop and row + rows > first:
            begins = begins if groups else row
            groups.append(group)
        row += rows
    return groups, begins


def _rows_at_once(metadata: Any, groups: Sequence[int], keys: Sequence[str], most: int) -> int:
    """Rows that are of `most` bytes together on average, in the row group where they are longest."""
    longest = 1
    for group in map(metadata.row_group, groups):
        columns = map(group.column, range(group.num_columns))
        size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema in keys)
        longest = max(longest, size // max(1, group.num_rows))
    return min(ROWS, max(1, most // longest))


def _rows_within(batch: Any, most: int) -> int:
    """How many rows from the first on it takes to reach `most` bytes of text; all, if they do not."""
    sizes = sum(map(_text_bytes, batch.columns), np.zeros(batch.num_rows, dtype=np.int64))
    return min(batch.num_rows, int(np.cumsum(sizes).searchsorted(most)) + 1)


def _values(column: Any) -> list[Any]:
    """A Parquet column's values; bytes of a string column that are not UTF-8 come out as lone surrogates, and very long
    strings as `LongString`."""
    try:
        if _text_bytes(column).max(initial=0) < long_string.LONG:
            return column.to_pylist()
        return [_value(column, index) for index in range(len(column))]
    except UnicodeDecodeError:
        import pyarrow

        binary = column.cast(pyarrow.large_string()).cast(pyarrow.large_binary())
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in binary.to_pylist()]


def _value(column: Any, index: int) -> Any:
    """A string or None of a string column, without a copy if it is very long."""
    _, offsets, data = column.buffers()
    width = np.int64 if str(column.type).startswith("large") else np.int32
    start, stop = np.frombuffer(offsets, width)[column.offset + index :][:2].tolist()
    if stop - start < long_string.LONG:
        return column[index].as_py()
    return long_string.in_utf8(data.slice(start, stop - start))


def _text_bytes(column: Any) -> np.ndarray:
    """Bytes of each value's text, int64 [rows]; 0 for all of a column that holds none as it is."""
    import pyarrow
    import pyarrow.compute

    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        return np.zeros(len(column), dtype=np.int64)
    sizes = pyarrow.compute.fill_null(pyarrow.compute.binary_length(column), 0)
    return sizes.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
