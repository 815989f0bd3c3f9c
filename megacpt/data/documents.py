"""Rows of text from JSON Lines (plain, gzip, zstd) and Parquet files, in a fixed order and bounded memory.

A file is cut into blocks of whole rows by `Source.blocks` (cheap, sequential) and a block is parsed by `parse_block`
(the expensive part, which may run in another process). A row is named `FILE:LINE`, both as the user knows them;
for Parquet the line is the row's number, from 1. Lines of white space alone hold no row and are passed over.
"""

import glob
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacpt.data.compression import Damaged, HashingFile, chunks_of
from megacpt.data.manifest import InputFile
from megacpt.errors import UserError
from megacpt.files import sha256_of

BLOCK_BYTES = 1 << 19
PARQUET_ROWS = 128
IN_A_FOLDER = re.compile(r"\.(jsonl?(\.gz|\.zst)?|parquet)$")
READABLE = (".jsonl", ".json", ".gz", ".zst", ".parquet")


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one file, not yet parsed: lines of JSON, or columns of values.

    Attributes:
        first: number of the first row, from 1.
        consumed: bytes of the file that were read to make this block.
    """

    file: str
    first: int
    consumed: int
    lines: bytes = b""
    columns: dict[str, list[Any]] | None = None
    rows: int = 0

    @property
    def size(self) -> int:
        """Bytes of decompressed JSON, or characters of text."""
        if self.columns is None:
            return len(self.lines)
        return sum(len(value) for column in self.columns.values() for value in column if isinstance(value, str))


class BadRow(Exception):
    """One row that cannot be used: `kind` is a counter's name, `reason` the words for a user."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason


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
    """One input file. Read `blocks` to the end, then ask `record` what was read.

    Raises (while reading):
        UserError: the file cannot be read, is truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise self._unreadable(error) from error
        self._sha256: str | None = None

    def record(self) -> InputFile:
        """Name, bytes and sha256 of the file, for a manifest."""
        assert self._sha256 is not None, "blocks() must be exhausted first"
        return InputFile(self.path.name, self.size, self._sha256)

    def blocks(self, keys: Sequence[str]) -> Iterator[Block]:
        """The file's rows in order, about half a megabyte of text at a time."""
        try:
            yield from self._parquet_blocks(keys) if self.path.suffix == ".parquet" else self._line_blocks()
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: cannot be read ({error.strerror or error})")

    def _line_blocks(self) -> Iterator[Block]:
        line, held, held_bytes, accounted = 1, [], 0, 0
        with open(self.path, "rb") as handle:
            raw = HashingFile(handle)
            try:
                for chunk in chunks_of(self.path, raw):
                    held.append(chunk)
                    held_bytes += len(chunk)
                    if held_bytes < BLOCK_BYTES or b"\n" not in chunk:
                        continue
                    lines, _, rest = b"".join(held).rpartition(b"\n")
                    yield Block(str(self.path), line, raw.position - accounted, lines)
                    line, accounted = line + lines.count(b"\n") + 1, raw.position
                    held, held_bytes = [rest], len(rest)
            except Damaged as error:
                place = _after("line", line - 1 + sum(chunk.count(b"\n") for chunk in held))
                raise UserError(f"{self.path}: {error} {place}; fetch or write the file again") from error
            rest = b"".join(held)
            if rest:
                yield Block(str(self.path), line, raw.position - accounted, rest.removesuffix(b"\n"))
            self._sha256 = raw.hexdigest()

    def _parquet_blocks(self, keys: Sequence[str]) -> Iterator[Block]:
        import pyarrow
        import pyarrow.parquet

        row = 1
        try:
            with pyarrow.parquet.ParquetFile(self.path) as table:
                present = [key for key in keys if key in table.schema_arrow.names]
                total = max(1, table.metadata.num_rows)
                for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=present):
                    rows = batch.num_rows
                    columns = {key: _values(batch.column(key)) for key in present}
                    yield Block(str(self.path), row, self.size * rows // total, columns=columns, rows=rows)
                    row += rows
        except pyarrow.ArrowException as error:
            reason = str(error).splitlines()[0].rstrip(".")
            place = _after("row", row - 1)
            raise UserError(f"{self.path}: damaged Parquet {place} ({reason}); fetch or write it again") from error
        self._sha256 = sha256_of(self.path)


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


def parse_block(
    block: Block, keys: Sequence[str], skipped: Counter[str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Rows of a block as (where, [text of each key]); a row is used whole or not at all.

    Args:
        skipped: None makes a bad row an error; a counter counts bad rows by kind (invalid_json, invalid_utf8,
            missing_key, not_a_string) and passes over them.

    Raises:
        UserError: a bad row, named by file and line.
    """
    for number, row in enumerate(_raw_rows(block), block.first):
        texts = _row(f"{block.file}:{number}", row, keys, skipped)
        if texts is not None:
            yield f"{block.file}:{number}", texts


def texts_of(block: Block, keys: Sequence[str], skipped: Counter[str] | None = None) -> list[list[str]]:
    """The texts of `parse_block`, key by key: [keys][rows]; faster, by a short way for the usual row."""
    import orjson

    columns: list[list[str]] = [[] for _ in keys]
    for number, row in enumerate(_raw_rows(block), block.first):
        texts: list[str] | None = None
        if isinstance(row, bytes):
            try:
                values = orjson.loads(row)
                texts = [values[key] for key in keys]
            except (ValueError, LookupError, TypeError):
                texts = None
        if texts is None or set(map(type, texts)) != {str}:
            texts = _row(f"{block.file}:{number}", row, keys, skipped)
        if texts is not None:
            for column, text in zip(columns, texts, strict=True):
                column.append(text)
    return columns


def _row(
    where: str, row: bytes | dict[str, Any], keys: Sequence[str], skipped: Counter[str] | None
) -> list[str] | None:
    """A row's texts, or None where it holds none."""
    if isinstance(row, bytes) and not row.strip():
        return None
    try:
        return _texts(row, keys)
    except BadRow as bad:
        if skipped is None:
            raise UserError(f"{where}: {bad.reason}; correct the row or pass --skip-invalid") from bad
        skipped[bad.kind] += 1
        return None


def _raw_rows(block: Block) -> Iterator[bytes | dict[str, Any]]:
    if block.columns is None:
        yield from block.lines.split(b"\n")
        return
    for index in range(block.rows):
        yield {key: column[index] for key, column in block.columns.items()}


def _texts(row: bytes | dict[str, Any], keys: Sequence[str]) -> list[str]:
    values, valid = (row, False) if isinstance(row, dict) else _parse_line(row)
    texts = []
    for key in keys:
        if key not in values:
            known = ", ".join(sorted(map(str, values))[:8]) or "no key at all"
            raise BadRow("missing_key", f"has no key {key!r} (it has {known})")
        value = values[key]
        if not isinstance(value, str):
            raise BadRow("not_a_string", f"the value of {key!r} is not a string but {type(value).__name__}")
        if not valid:
            _check_unicode(key, value)
        texts.append(value)
    return texts


def _parse_line(line: bytes) -> tuple[dict[str, Any], bool]:
    """The JSON object on a line, and whether its strings are known to be valid Unicode.

    orjson is several times faster and stricter than json, which decides what a valid line is: it takes NaN, and
    lone surrogates (refused later, where they would reach a tokenizer).
    """
    import orjson

    try:
        row, valid = orjson.loads(line), True
    except orjson.JSONDecodeError:
        row, valid = _parse_leniently(line), False
    if not isinstance(row, dict):
        raise BadRow("invalid_json", f"is not a JSON object but {type(row).__name__}; each line must be one object")
    return row, valid


def _parse_leniently(line: bytes) -> Any:
    import json

    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("invalid_utf8", f"invalid UTF-8 at byte {error.start + 1:,} of the line") from error
    except json.JSONDecodeError as error:
        reason = f"invalid JSON ({error.msg} at column {error.colno:,}); each line must be one JSON object"
        raise BadRow("invalid_json", reason) from error
    except (ValueError, RecursionError) as error:
        raise BadRow("invalid_json", f"invalid JSON ({error}); each line must be one JSON object") from error


def _check_unicode(key: str, value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"invalid UTF-8: the value of {key!r} has no Unicode character at position {error.start + 1:,}"
        raise BadRow("invalid_utf8", reason) from error


def read_documents(paths: Sequence[Path], key: str, skipped: Counter[str] | None = None) -> Iterator[tuple[str, str]]:
    """Every row's (where, text) in order; `skipped` as in `parse_block`."""
    for path in paths:
        for block in Source(path).blocks([key]):
            for where, (text,) in parse_block(block, [key], skipped):
                yield where, text
