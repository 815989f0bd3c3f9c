"""Very long strings, such as those of a JSON line or of Parquet: left as they lie there, and decoded a piece at a time.

Python keeps a string with as many bytes for each character as the widest of them takes, one to four: a document of 200
MB with a single emoji would be 800 MB.
"""

import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

LONG = 1 << 24
"""Bytes from which a string is left where it lies."""
PIECE = 1 << 21
"""Bytes that are decoded at once, about."""
# Places that are never within an escape sequence, nor between the halves of a surrogate pair: before a space, a letter
# that is not ASCII, an escape sequence other than a low surrogate, and what comes after as many letters as a pair has.
CUT = re.compile(rb"[ \xc2-\xf4]|(?<!\\)\\(?!u[dD][c-fC-F])|(?<=[0-9A-Za-z]{12})[0-9A-Za-z]")


@dataclass(frozen=True)
class LongString(ABC):
    """Text that is valid Unicode and is no str yet.

    Attributes:
        length: its characters, which is also its `len`.
        text_bytes: its size in UTF-8.
    """

    length: int
    text_bytes: int

    def __len__(self) -> int:
        return self.length

    def __str__(self) -> str:
        return "".join(self.pieces())

    @abstractmethod
    def pieces(self) -> Iterator[str]:
        """The string, in pieces of about PIECE bytes."""


@dataclass(frozen=True)
class JsonString(LongString):
    """What stands between the quotation marks of a JSON string: bytes `start` to `stop` of a line."""

    line: bytes
    start: int
    stop: int

    def pieces(self) -> Iterator[str]:
        return _pieces(self.line, self.start, self.stop)


@dataclass(frozen=True)
class Utf8String(LongString):
    """UTF-8 in a buffer."""

    buffer: Any

    def pieces(self) -> Iterator[str]:
        return _utf8_pieces(memoryview(self.buffer))


@dataclass(frozen=True)
class Parts(LongString):
    """Strings one after the other."""

    parts: tuple[str, ...]

    def pieces(self) -> Iterator[str]:
        return iter(self.parts)


def chunks_of(text: str | LongString, size: int) -> Iterator[str]:
    """A text cut anywhere, a str into `size` characters."""
    return text.pieces() if isinstance(text, LongString) else (text[i : i + size] for i in range(0, len(text), size))


def cut_at[T: (str, bytes)](pieces: Iterable[T], border: Callable[[T], int], empty: T) -> Iterator[T]:
    """The same text in other pieces, of which all but the last end where `border` finds an end in one; 0 is nowhere."""
    held: list[T] = []
    for piece in pieces:
        end = border(piece)
        if not end:
            held.append(piece)
            continue
        held.append(piece[:end])
        whole, held = empty.join(held), [piece[end:]]
        yield whole
    # What is held may be large, and is there twice until it is let go of.
    whole, held = empty.join(held), []
    yield whole


def in_utf8(buffer: Any) -> Utf8String:
    """The text of a buffer.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    data = memoryview(buffer)
    return Utf8String(sum(map(len, _utf8_pieces(data))), data.nbytes, buffer)


def _utf8_pieces(data: memoryview) -> Iterator[str]:
    start = 0
    while start < len(data):
        end = min(len(data), start + PIECE)
        while start < end < len(data) and data[end] & 0xC0 == 0x80:
            end -= 1
        # Of what begins with nothing but bytes that go on, decoding is left to complain.
        end = end if end > start else len(data)
        yield str(data[start:end], "utf-8")
        start = end


def loads(line: bytes) -> Any:
    """The JSON value of a line, as orjson has it but for strings of LONG bytes or more: these are `JsonString`.

    Only values directly in the outermost object become one; in what is nested there another string stands for it.

    Raises:
        ValueError: not JSON, or not in the sense of orjson.
    """
    import orjson

    found: dict[str, JsonString] = {}
    parts: list[bytes] = []
    unused, done = secrets.token_hex(16), 0
    for start, stop in _strings(line):
        if stop - start >= LONG:
            name = f"{unused}{len(found)}"
            parts += [line[done:start], name.encode()]
            found[name], done = _checked(line, start, stop), stop
    value = orjson.loads(b"".join([*parts, line[done:]]))
    if not isinstance(value, dict):
        return value
    return {str(found.get(key, key)): found.get(it, it) if isinstance(it, str) else it for key, it in value.items()}


def _strings(line: bytes) -> Iterator[tuple[int, int]]:
    """Where strings begin and end, without their quotation marks, if the line is JSON."""
    at = line.find(b'"')
    while at >= 0:
        start = at + 1
        stop = line.find(b'"', start)
        while stop >= 0 and _escaped(line, stop):
            stop = line.find(b'"', stop + 1)
        if stop < 0:
            return
        yield start, stop
        at = line.find(b'"', stop + 1)


def _escaped(line: bytes, at: int) -> bool:
    before = at
    while line[before - 1] == ord("\\"):
        before -= 1
    return (at - before) % 2 == 1


def _checked(line: bytes, start: int, stop: int) -> JsonString:
    length = text_bytes = 0
    for piece in _pieces(line, start, stop):
        length += len(piece)
        text_bytes += len(piece) if piece.isascii() else len(piece.encode("utf-8"))
    return JsonString(length, text_bytes, line, start, stop)


def _pieces(line: bytes, start: int, stop: int) -> Iterator[str]:
    import orjson

    while start < stop:
        cut = CUT.search(line, start + PIECE, stop) if start + PIECE < stop else None
        end = cut.start() if cut else stop
        yield orjson.loads(b'"%b"' % line[start:end])
        start = end
