"""JSON Lines (plain, gzip, zstd) and Parquet files cut into blocks of whole rows, in a fixed order and bounded memory.

That is cheap and sequential; a block is parsed by `rows.parse_block`, which may run in another process.
"""

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megacpt.data.text.compression import CHUNK_BYTES, Damaged, HashingFile, chunks_of
from megacpt.data.text.provenance import InputFile
from megacpt.errors import UserError
from megacpt.files import sha256_of

BLOCK_BYTES = 1 << 19
PARQUET_ROWS = 128
IN_A_FOLDER = re.compile(r"\.(jsonl?(\.gz|\.zst)?|parquet)$")
PACKED = (".gz", ".zst")
READABLE = (".jsonl", ".json", ".gz", ".zst", ".parquet")


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one file, not yet parsed: lines of JSON, or columns of values.

    Attributes:
        file: as rows are named: the path, or the path and the byte from which rows are counted.
        first: number of the first row, from 1.
        consumed: bytes of the file that were read to make this block.
        rows: how many, blank lines included.
        offset: where the first row begins: bytes after decompression; for Parquet, rows.
        plain: the file in which `lines` lie at `offset` as they are; empty if it is packed.
    """

    file: str
    first: int
    consumed: int
    lines: bytes = b""
    columns: dict[str, list[Any]] | None = None
    rows: int = 0
    offset: int = 0
    plain: str = ""

    @property
    def end(self) -> "Place":
        """Where the row after this block begins."""
        size = self.rows if self.columns is not None else len(self.lines) + 1
        return Place(self.first + self.rows, self.offset + size)

    @property
    def size(self) -> int:
        """Bytes of decompressed JSON, or characters of text."""
        if self.columns is None:
            return len(self.lines)
        return sum(len(value) for column in self.columns.values() for value in column if isinstance(value, str))


@dataclass(frozen=True)
class Place:
    """Where a row begins: its number, from 1, and its offset as in `Block`."""

    row: int = 1
    offset: int = 0


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Resolve files, folders and globs to files.

    Patterns keep the order in which they were given; the files of a folder (searched to any depth, .jsonl, .json,
    .jsonl.gz, .jsonl.zst and .parquet alone) and of a glob are sorted by path.

    Raises:
        UserError: a pattern matches nothing, a file is of an unknown kind, or a file is matched twice.
    """
    paths: list[Path] = []
    found: dict[Path, str] = {}
    for pattern in patterns:
        for path in _expand(pattern):
            if path.suffix not in READABLE:
                raise UserError(f"{path}: unknown kind of input; give .jsonl, .json, .jsonl.gz, .jsonl.zst or .parquet")
            key = path.resolve()
            if key in found:
                raise UserError(f"{path}: given twice (by {found[key]!r} and by {pattern!r}); give each input once")
            found[key] = pattern
            paths.append(path)
    return paths


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        matches = [p for p in inside if p.is_file() and IN_A_FOLDER.search(p.name) and not _is_manifest(p)]
        if not matches:
            raise UserError(f"{pattern}: this folder holds no .jsonl, .json, .jsonl.gz, .jsonl.zst or .parquet file")
    else:
        matches = [p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file() and not _is_manifest(p)]
        if not matches:
            raise UserError(f"{pattern}: no file matches; give an existing file, folder or glob to --input")
    return sorted(matches)


def _is_manifest(path: Path) -> bool:
    """Whether this is the manifest of a dataset written into the same folder, rather than text."""
    return path.suffix == ".json" and path.with_suffix(".idx").exists()


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

    def blocks(self, keys: Sequence[str], start: Place | None = None) -> Iterator[Block]:
        """The part's rows in order, about half a megabyte of text at a time; from `start`, the end of some block."""
        parquet = self.path.suffix == ".parquet"
        try:
            yield from self._parquet_blocks(keys, start) if parquet else self._line_blocks(start)
            if self._stat() != (self.size, self.mtime_ns):
                raise UserError(f"{self.path}: was changed while it was read; run again once nothing writes to it")
            if self.ended is None and not self._sha256:
                self._sha256 = sha256_of(self.path)
        except OSError as error:
            raise self._unreadable(error) from error

    def _stat(self) -> tuple[int, int]:
        try:
            found = self.path.stat()
        except OSError as error:
            raise self._unreadable(error) from error
        return found.st_size, found.st_mtime_ns

    def _unreadable(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: cannot be read ({error.strerror or error})")

    def _set_edges(self, first: int, stop: int, end: int) -> None:
        self.began = first if first < end or not self.begin else None
        self.ended = stop if stop < end else None

    def _line_blocks(self, start: Place | None) -> Iterator[Block]:
        with open(self.path, "rb") as handle:
            if self.packed:
                yield from self._packed_blocks(handle, start)
                return
            first = _row_start(handle, self.begin)
            stop = self.size if self.end is None else _row_start(handle, self.end)
            self._set_edges(first, stop, self.size)
            place = start or Place(1, first)
            raw = HashingFile(handle, place.offset, stop)
            yield from self._cut(raw, place)
            if place.offset == 0 and self.ended is None:
                self._sha256 = raw.hexdigest()

    def _packed_blocks(self, handle: IO[bytes], start: Place | None) -> Iterator[Block]:
        """Read from the beginning, whatever the part: that is how these formats are."""
        raw = HashingFile(handle)
        taken = start.offset if start else 0
        at = 0
        for block in self._cut(raw, Place()):
            if at >= self.begin and self.began is None:
                self.began = block.offset
            if self.end is not None and at >= self.end:
                self.ended = block.offset
                return
            if at >= self.begin and block.offset >= taken:
                yield block
            at += block.consumed
        self._sha256 = raw.hexdigest()

    def _cut(self, raw: HashingFile, place: Place) -> Iterator[Block]:
        """Blocks of whole lines."""
        counted_from = self.began or 0
        name = f"{self.path} (from byte {counted_from:,})" if counted_from else str(self.path)
        plain = "" if self.packed else str(self.path)
        line, offset, accounted = place.row, place.offset, raw.position
        held: list[bytes] = []
        held_bytes = 0
        try:
            for chunk in chunks_of(self.path, raw):
                held.append(chunk)
                held_bytes += len(chunk)
                if held_bytes < BLOCK_BYTES or b"\n" not in chunk:
                    continue
                lines, _, rest = b"".join(held).rpartition(b"\n")
                rows = lines.count(b"\n") + 1
                yield Block(name, line, raw.position - accounted, lines, rows=rows, offset=offset, plain=plain)
                line, offset, accounted = line + rows, offset + len(lines) + 1, raw.position
                held, held_bytes = [rest], len(rest)
        except Damaged as error:
            after = _after("line", line - 1 + sum(chunk.count(b"\n") for chunk in held))
            raise UserError(f"{self.path}: {error} {after}; fetch or write the file again") from error
        rest = b"".join(held)
        if rest:
            rows = rest.count(b"\n") + (not rest.endswith(b"\n"))
            lines = rest.removesuffix(b"\n")
            yield Block(name, line, raw.position - accounted, lines, rows=rows, offset=offset, plain=plain)

    def _parquet_blocks(self, keys: Sequence[str], start: Place | None) -> Iterator[Block]:
        import pyarrow
        import pyarrow.parquet

        row = 0
        try:
            with pyarrow.parquet.ParquetFile(self.path) as table:
                present = [key for key in keys if key in table.schema_arrow.names]
                total = table.metadata.num_rows
                first = -(-self.begin * total // self.size)
                stop = total if self.end is None else -(-self.end * total // self.size)
                self._set_edges(first, stop, total)
                first = start.offset if start else first
                groups, row = _row_groups(table.metadata, first, stop)
                for batch in table.iter_batches(batch_size=PARQUET_ROWS, row_groups=groups, columns=present):
                    head, tail = max(0, first - row), min(batch.num_rows, stop - row)
                    at, rows, row = row + head, tail - head, row + batch.num_rows
                    if rows <= 0:
                        continue
                    columns = {key: _values(batch.column(key).slice(head, rows)) for key in present}
                    consumed = self.size * rows // total
                    yield Block(str(self.path), at + 1, consumed, columns=columns, rows=rows, offset=at)
        except pyarrow.ArrowException as error:
            reason = str(error).splitlines()[0].rstrip(".")
            place = _after("row", row)
            raise UserError(f"{self.path}: damaged Parquet {place} ({reason}); fetch or write it again") from error


def _row_start(handle: IO[bytes], position: int) -> int:
    """Where the first line that begins at `position` or later begins; the file's size if none does."""
    if position == 0:
        return 0
    handle.seek(position - 1)
    while True:
        chunk = handle.read(CHUNK_BYTES)
        end = chunk.find(b"\n")
        if end >= 0:
            return handle.tell() - len(chunk) + end + 1
        if not chunk:
            return handle.tell()


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


def _after(unit: str, last: int) -> str:
    return f"after {unit} {last:,}" if last else "at its start"


def _values(column: Any) -> list[Any]:
    """A Parquet column's values; bytes of a string column that are not UTF-8 come out as lone surrogates."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        import pyarrow

        binary = column.cast(pyarrow.large_string()).cast(pyarrow.large_binary())
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in binary.to_pylist()]
