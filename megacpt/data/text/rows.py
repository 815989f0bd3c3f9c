"""Rows of text from a block of JSON lines or Parquet columns: the expensive half of reading.

A row is named `FILE:LINE`, both as the user knows them; for Parquet the line is the row's number, from 1. Lines of
white space alone hold no row and are passed over.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from megacpt.data.text import long_string
from megacpt.data.text.documents import Block
from megacpt.data.text.long_string import JsonString, LongString
from megacpt.errors import UserError


class WrongRow(UserError):
    """What is wrong with the `index`-th row, from 0, of a block of `file` whose first row has the number `first`."""

    def __init__(self, file: str, first: int, index: int, words: str) -> None:
        super().__init__(f"{file}:{first + index}: {words}")
        self.file, self.first, self.index, self.words = file, first, index, words

    def __reduce__(self) -> tuple[Any, ...]:
        return WrongRow, (self.file, self.first, self.index, self.words)

    def named(self, block: Block) -> UserError:
        """The same of a row of this block, which may not have been numbered when it was parsed."""
        first = self.first or block.numbered().first
        return UserError(f"{self.file}:{first + self.index}: {self.words}")


class BadRow(Exception):
    """One row that cannot be used: `kind` is a counter's name, `reason` the words for a user."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason


def parse_block(
    block: Block, keys: Sequence[str], skipped: Counter[str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Rows of a block as (where, [text of each key]); a row is used whole or not at all.

    Args:
        skipped: None makes a bad row an error; a counter counts bad rows by kind (invalid_json, invalid_utf8,
            missing_key, not_a_string) and passes over them.

    Raises:
        WrongRow: a bad row, named by file and line.
    """
    for index, row in enumerate(_raw_rows(block)):
        texts = _row(block, index, row, keys, skipped)
        if texts is not None:
            yield f"{block.file}:{block.first + index}", list(map(str, texts))


def texts_of(block: Block, keys: Sequence[str], skipped: Counter[str] | None = None) -> list[list[str | LongString]]:
    """The texts of `parse_block`, key by key: [keys][rows]; faster, by a short way for the usual row, and with very
    long ones where they lie."""
    import orjson

    columns: list[list[str | LongString]] = [[] for _ in keys]
    for index, row in enumerate(_raw_rows(block)):
        texts: Sequence[str | LongString] | None = None
        if isinstance(row, bytes):
            try:
                values = orjson.loads(row) if len(row) < long_string.LONG else long_string.loads(row)
                texts = [values[key] for key in keys]
            except (ValueError, LookupError, TypeError):
                texts = None
        if texts is None or not set(map(type, texts)) <= {str, JsonString}:
            texts = _row(block, index, row, keys, skipped)
        if texts is not None:
            for column, text in zip(columns, texts, strict=True):
                column.append(text)
    return columns


def _row(
    block: Block, index: int, row: bytes | dict[str, Any], keys: Sequence[str], skipped: Counter[str] | None
) -> list[str | LongString] | None:
    """A row's texts, or None where it holds none."""
    if isinstance(row, bytes) and not row.strip():
        return None
    try:
        return _texts(row, keys, block.known)
    except BadRow as bad:
        if skipped is None:
            words = f"{bad.reason}; correct the row or pass --skip-invalid"
            raise WrongRow(block.file, block.first, index, words) from bad
        skipped[bad.kind] += 1
        return None


def _raw_rows(block: Block) -> Iterator[bytes | dict[str, Any]]:
    if block.columns is None:
        yield from block.lines.split(b"\n")
        return
    for index in range(block.rows):
        yield {key: column[index] for key, column in block.columns.items()}


def _texts(row: bytes | dict[str, Any], keys: Sequence[str], known: Sequence[str]) -> list[str | LongString]:
    values, valid = (row, False) if isinstance(row, dict) else _parse_line(row)
    texts: list[str | LongString] = []
    for key in keys:
        if key not in values:
            names = ", ".join(sorted(known or map(str, values))[:8]) or "no key at all"
            raise BadRow("missing_key", f"has no key {key!r} (it has {names})")
        value = values[key]
        if not isinstance(value, str | LongString):
            raise BadRow("not_a_string", f"the value of {key!r} is not a string but {type(value).__name__}")
        if not valid and isinstance(value, str):
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
