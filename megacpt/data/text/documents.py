"""JSON Lines (plain, gzip, zstd) and Parquet files cut into blocks of whole rows, in a fixed order and bounded memory.

That is cheap and sequential; a block is parsed by `rows.parse_block`, which may run in another process.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from megacpt.data.text.compression import CHUNK_BYTES, Damaged, HashingFile, chunks_of
from megacpt.data.text.inputs import unreadable
from megacpt.data.text.long_string import LongString
from megacpt.data.text.parquet import row_blocks
from megacpt.data.text.provenance import InputFile
from megacpt.errors import UserError
from megacpt.files import sha256_of

BLOCK_BYTES = 1 << 21
LINE_BYTES = 1 << 14
"""Read at once to find the end of a line."""
PAGE_BYTES = 1 << 20
"""Read at once of a Parquet column."""
PACKED = (".gz", ".zst")


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one file, not yet parsed: lines of JSON, or columns of values.

    Attributes:
        file: as rows are named: the path, or the path and the byte from which rows are counted.
        first: number of the first row, from 1; 0 where nobody has counted the rows before it.
        consumed: bytes of the file that were read to make this block.
        known: names of all columns of the file, for errors.
        rows: how many rows the columns hold.
        offset: where the first row begins: bytes after decompression; for Parquet, rows.
        plain: the file in which the lines lie at `offset` as they are; empty if it is packed.
        counted_from: byte of that file from which rows are counted.
        unread: bytes of lines that are still to be read from there.
    """

    file: str
    first: int
    consumed: int
    lines: bytes = b""
    columns: dict[str, list[Any]] | None = None
    known: Sequence[str] = ()
    rows: int = 0
    offset: int = 0
    plain: str = ""
    counted_from: int = 0
    unread: int = 0

    @property
    def end(self) -> int:
        """The offset of the row after this block."""
        return self.offset + (self.rows if self.columns is not None else len(self.lines) + self.unread + 1)

    @property
    def size(self) -> int:
        """Bytes of decompressed JSON, or characters of text."""
        if self.columns is None:
            return len(self.lines) + self.unread
        values = (value for column in self.columns.values() for value in column)
        return sum(len(value) for value in values if isinstance(value, str | LongString))

    def loaded(self) -> "Block":
        """With its lines, in whichever process asks.

        Raises:
            UserError: the file cannot be read, or ends earlier than it did.
        """
        if not self.unread:
            return self
        try:
            with open(self.plain, "rb", buffering=0) as handle:
                handle.seek(self.offset)
                lines = handle.read(self.unread)
        except OSError as error:
            raise unreadable(self.plain, error) from error
        if len(lines) < self.unread:
            raise _changed(self.plain)
        return replace(self, lines=lines, unread=0)

    def numbered(self) -> "Block":
        """With the number of its first row; the file is read up to it if need be."""
        return self if self.first else replace(self, first=1 + _line_ends(self.plain, self.counted_from, self.offset))


class Source:
    """One input file, or a part of it. Read `blocks` to the end, then ask `record` what was read.

    Args:
        begin, end: the part: rows that begin in these bytes of the file as it lies on disk (for a packed file, rows of
            blocks that do; for Parquet, the same share of its rows). Parts that adjoin share no row and lack none.

    Attributes:
        began, ended: offsets of the part's first row and of the one after its last, once known; None at the file's end.

    Raises (while reading):
        UserError: the file cannot be read, is truncated or damaged, or changes.
    """

    def __init__(self, path: Path, begin: int = 0, end: int | None = None) -> None:
        self.path, self.begin, self.end = path, begin, end
        self.size, self.mtime_ns = self._stat()
        self.began: int | None = None if begin else 0
        self.ended: int | None = None
        self._sha256 = ""

    @property
    def packed(self) -> bool:
        """Whether the file is compressed as a whole."""
        return self.path.suffix in PACKED

    @property
    def part_size(self) -> int:
        """Bytes of the part on disk, about."""
        return (self.size if self.end is None else self.end) - self.begin

    def record(self) -> InputFile:
        """Name, bytes and sha256 of the file, for a manifest; no sha256 where the part ends before the file does."""
        return InputFile(self.path.name, self.size, self._sha256)

    def blocks(self, keys: Sequence[str], start: int | None = None) -> Iterator[Block]:
        """The part's rows in order, about two megabytes of text at a time; from `start`, the end of some block."""
        first = 0
        for block in self.pieces(keys, start):
            if block.plain:
                first = first or block.numbered().first
                block = replace(block.loaded(), first=first)
                first += block.lines.count(b"\n") + 1
            yield block

    def pieces(self, keys: Sequence[str], start: int | None = None) -> Iterator[Block]:
        """`blocks`, of which those of a plain file are neither loaded nor numbered."""
        parquet = self.path.suffix == ".parquet"
        try:
            yield from self._parquet_blocks(keys, start) if parquet else self._line_blocks(start)
            if self._stat() != (self.size, self.mtime_ns):
                raise _changed(self.path)
            if self.ended is None and not self._sha256:
                self._sha256 = sha256_of(self.path)
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _stat(self) -> tuple[int, int]:
        try:
            found = self.path.stat()
        except OSError as error:
            raise unreadable(self.path, error) from error
        return found.st_size, found.st_mtime_ns

    def _set_edges(self, first: int, stop: int, end: int) -> None:
        self.began = first if first < end or not self.begin else None
        self.ended = stop if stop < end else None

    def _line_blocks(self, start: int | None) -> Iterator[Block]:
        with open(self.path, "rb") as handle:
            if self.packed:
                yield from self._packed_blocks(handle, start)
                return
            first = _row_start(handle, self.begin)
            stop = self.size if self.end is None else _row_start(handle, self.end)
            self._set_edges(first, stop, self.size)
            first = start or first
            if first > 0 or self.ended is not None:
                yield from self._plain_blocks(handle, first, stop)
                return
            raw = HashingFile(handle)
            for block in self._plain_blocks(handle, first, stop):
                yield block
                # Close behind whoever loads the block, so that the disk is read once.
                raw.pass_to(block.offset + block.consumed)
            self._sha256 = raw.hexdigest()

    def _plain_blocks(self, handle: IO[bytes], offset: int, stop: int) -> Iterator[Block]:
        """Blocks that end with the first line that ends BLOCK_BYTES or more after their beginning."""
        counted_from = self.began or 0
        name = f"{self.path} (from byte {counted_from:,})" if counted_from else str(self.path)
        while offset < stop:
            end = min(stop, _row_start(handle, offset + BLOCK_BYTES))
            unread = end - offset - (os.pread(handle.fileno(), 1, end - 1) == b"\n")
            yield Block(
                name, 0, end - offset, offset=offset, plain=str(self.path), counted_from=counted_from, unread=unread
            )
            offset = end

    def _packed_blocks(self, handle: IO[bytes], start: int | None) -> Iterator[Block]:
        """Read from the beginning, whatever the part: that is how these formats are."""
        raw = HashingFile(handle)
        taken = start or 0
        at = 0
        for block in self._cut(raw):
            if at >= self.begin and self.began is None:
                self.began = block.offset
            if self.end is not None and at >= self.end:
                self.ended = block.offset
                return
            at, within = at + block.consumed, at >= self.begin and block.offset >= taken
            if within:
                yield block
            del block
        self._sha256 = raw.hexdigest()

    def _cut(self, raw: HashingFile) -> Iterator[Block]:
        """Blocks of whole lines."""
        line, offset, accounted = 1, 0, 0
        held: list[bytes] = []
        held_bytes = 0
        try:
            for chunk in chunks_of(self.path, raw):
                if held_bytes + len(chunk) < BLOCK_BYTES or b"\n" not in chunk:
                    held.append(chunk)
                    held_bytes += len(chunk)
                    continue
                last, _, rest = chunk.rpartition(b"\n")
                lines = b"".join([*held, last])
                held, held_bytes = [rest], len(rest)
                block = Block(str(self.path), line, raw.position - accounted, lines, offset=offset)
                line, offset, accounted = line + lines.count(b"\n") + 1, offset + len(lines) + 1, raw.position
                # Of a very long line there is one copy, in whoever has the block.
                del lines
                yield block
                del block
        except Damaged as error:
            after = _after("line", line - 1 + sum(chunk.count(b"\n") for chunk in held))
            raise UserError(f"{self.path}: {error} {after}; fetch or write the file again") from error
        rest = b"".join(held)
        held.clear()
        if rest:
            yield Block(str(self.path), line, raw.position - accounted, rest.removesuffix(b"\n"), offset=offset)

    def _parquet_blocks(self, keys: Sequence[str], start: int | None) -> Iterator[Block]:
        import pyarrow
        import pyarrow.parquet

        row = 0
        try:
            # Pages are read one by one, and not a whole column of a row group before the first of them.
            with pyarrow.parquet.ParquetFile(
                self.path, buffer_size=PAGE_BYTES, pre_buffer=False, page_checksum_verification=True
            ) as table:
                total = table.metadata.num_rows
                first = -(-self.begin * total // self.size)
                stop = total if self.end is None else -(-self.end * total // self.size)
                self._set_edges(first, stop, total)
                known = table.schema_arrow.names
                for key in keys:
                    if known.count(key) > 1:
                        raise UserError(f"{self.path}: has more than one column {key!r}; write it with one")
                for at, rows, columns in row_blocks(table, keys, first if start is None else start, stop, BLOCK_BYTES):
                    row, consumed = at + rows, self.size * rows // total
                    yield Block(str(self.path), at + 1, consumed, columns=columns, known=known, rows=rows, offset=at)
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            # What cannot be unpacked is an OSError without a number.
            reason = str(error).splitlines()[0].rstrip(".")
            place = _after("row", row)
            raise UserError(f"{self.path}: damaged Parquet {place} ({reason}); fetch or write it again") from error


def _changed(path: str | Path) -> UserError:
    return UserError(f"{path}: was changed while it was read; run again once nothing writes to it")


def _row_start(handle: IO[bytes], position: int) -> int:
    """Where the first line that begins at `position` or later begins; the file's size if none does."""
    if position == 0:
        return 0
    position -= 1
    while chunk := os.pread(handle.fileno(), LINE_BYTES, position):
        end = chunk.find(b"\n")
        if end >= 0:
            return position + end + 1
        position += len(chunk)
    return position


def _line_ends(path: str, start: int, stop: int) -> int:
    """Line feeds in bytes [start, stop) of a file."""
    if start == stop:
        return 0
    with open(path, "rb", buffering=0) as handle:
        handle.seek(start)
        sizes = (min(CHUNK_BYTES, stop - at) for at in range(start, stop, CHUNK_BYTES))
        return sum(handle.read(size).count(b"\n") for size in sizes)


def _after(unit: str, last: int) -> str:
    return f"after {unit} {last:,}" if last else "at its start"
