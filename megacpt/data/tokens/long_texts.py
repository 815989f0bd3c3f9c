"""Long texts encoded, and many ids decoded, a piece at a time as if whole: memory does not grow with a document.

A tokenizer needs many times the memory of what it encodes at once. A piece ends between two of its own tokens, a little
before the end of what was read, and the next piece begins there, amid a word if need be. That the next piece goes on as
the one before would have, had it been longer, is seen where both hold the same text: ids have to be the same there.
For pair merging agreement on two neighbouring tokens would do: tokens of which any two neighbours are the encoding of
their own text are that of all of it (the `bpe` crate of github/rust-gems encodes by this). Here it is half of the text
that both hold, for the sake of what cuts a text into words. Text in which no such place is found is encoded whole.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, product
from typing import NamedTuple

import numpy as np

from megacpt.data.text.long_string import LongString, Parts, chunks_of
from megacpt.data.tokens.packed import Packed, narrowed
from megacpt.data.tokens.tokenizer import Encoded, Tokenizer, sizes_of

LONG = 1 << 21
"""Characters from which a text is encoded in pieces, and of a piece, about."""
SHARED = 1 << 11
"""Characters at the end of a piece that the next one encodes again."""
TRIES = 256
"""Places that are tried as the end of a piece; a token of white space may have a hundred characters and more."""
MARKS = ("", "\x01")
"""What stands before a piece, for it to be encoded as what goes on: a tokenizer may put a space before a text."""
IDS = 1 << 16
"""Ids that are decoded at once, about."""
BESIDE = 64
"""Ids on each side of a place that are decoded both ways."""
BROKEN = "\ufffd"
"""What bytes that are no character are decoded to."""
NONE = np.empty(0, np.int32)


class EncodedTexts(NamedTuple):
    """Texts encoded, end to end: of each its tokens, int32 [texts], and its UTF-8 bytes, int64 [texts]."""

    tokens: Packed
    lengths: np.ndarray
    text_bytes: np.ndarray


@dataclass
class Piece:
    """Text that begins at a border of tokens.

    Attributes:
        mark: one of MARKS.
        expected: ids int32 [some] that it begins with unless the border is none.
        enough: characters that it needs to be worth cutting.
    """

    text: str = ""
    mark: str = ""
    expected: np.ndarray = field(default_factory=lambda: NONE)
    enough: int = 0

    def ids(self, tokenizer: Tokenizer) -> np.ndarray | None:
        """Its ids int32 [tokens]; None where it does not begin as expected."""
        ids = _after(tokenizer, self.mark, self.text)
        return ids if ids is not None and _begins_with(ids, self.expected) else None


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str | LongString], dtype: np.dtype, eod: int | None = None
) -> EncodedTexts:
    """`Tokenizer.encode_flat` of texts framed as the tokenizer frames them, for a dataset of this dtype.

    Args:
        eod: ends every text that has tokens.
    """
    short = [text for text in texts if isinstance(text, str) and len(text) <= LONG]
    if len(short) == len(texts):
        encoded = tokenizer.encode_flat(short, add_special_tokens=True)
        encoded = encoded._replace(ids=encoded.ids.astype(dtype, copy=False))
        ids, own_lengths, text_bytes = encoded if eod is None else _with_eod(encoded, eod)
        return EncodedTexts(Packed((ids,), dtype), own_lengths, text_bytes)
    parts: list[np.ndarray] = []
    lengths, sizes = [], []
    for text in texts:
        length = 0
        for part in _encoded(tokenizer, text):
            parts.append(narrowed(part, dtype))
            length += len(part)
        if eod is not None and length:
            parts.append(narrowed(np.array([eod]), dtype))
            length += 1
        lengths.append(length)
        sizes.append(_text_bytes(text))
    return EncodedTexts(Packed(tuple(parts), dtype), np.array(lengths, np.int32), np.array(sizes))


def _text_bytes(text: str | LongString) -> int:
    if isinstance(text, LongString):
        return text.text_bytes
    return sum(int(sizes_of([chunk])[0]) for chunk in chunks_of(text, LONG))


def decode_text(tokenizer: Tokenizer, ids: np.ndarray) -> str | LongString:
    """The text of ids, int [tokens], in pieces if there are many."""
    if len(ids) <= IDS:
        return tokenizer.decode(ids)
    parts, start = [], 0
    while start < len(ids):
        text, start = _decoded_from(tokenizer, ids, start)
        parts.append(text)
    return Parts(sum(map(len, parts)), int(sizes_of(parts).sum()), tuple(parts))


def _decoded_from(tokenizer: Tokenizer, ids: np.ndarray, start: int) -> tuple[str, int]:
    """The text of about IDS ids from a place on, and where it ends: not between the bytes of a character, nor before a
    space that a tokenizer leaves out at the beginning of a text."""
    for place in range(start + IDS, min(len(ids), start + IDS + TRIES)):
        if _ends_text(tokenizer, ids, place):
            return tokenizer.decode(ids[start:place]), place
    return tokenizer.decode(ids[start:]), len(ids)


def _ends_text(tokenizer: Tokenizer, ids: np.ndarray, place: int) -> bool:
    """Whether the ids before a place and those after it have the texts that they have together."""
    # Some of these begin and end with a character, of four bytes at most.
    for more, rest in product(range(4), range(4)):
        first, last = max(0, place - BESIDE - more), place + BESIDE + rest
        before, after = tokenizer.decode(ids[first:place]), tokenizer.decode(ids[place:last])
        if before.endswith(BROKEN) or after.startswith(BROKEN):
            continue
        if before + after == tokenizer.decode(ids[first:last]):
            return True
    return False


def _with_eod(encoded: Encoded, eod: int) -> Encoded:
    filled = encoded.lengths > 0
    ids = np.insert(encoded.ids, np.cumsum(encoded.lengths, dtype=np.int64)[filled], eod)
    return Encoded(ids, encoded.lengths + filled.astype(np.int32), encoded.text_bytes)


def _encoded(tokenizer: Tokenizer, text: str | LongString) -> Iterator[np.ndarray]:
    """The text's ids, int32 [some] at a time."""
    frame = framing(tokenizer) if len(text) > LONG else None
    if frame is None:
        yield tokenizer.encode(str(text), add_special_tokens=True)
        return
    before, after = frame
    yield before
    yield from _in_pieces(tokenizer, chunks_of(text, LONG))
    yield after


def framing(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids int32 that the tokenizer puts before and after a text; None where that is not understood."""
    plain, framed = (tokenizer.encode("a", special).tolist() for special in (False, True))
    starts = [i for i in range(len(framed) - len(plain) + 1) if framed[i : i + len(plain)] == plain]
    if not plain or not starts:
        return None
    return np.array(framed[: starts[0]], np.int32), np.array(framed[starts[0] + len(plain) :], np.int32)


def _in_pieces(tokenizer: Tokenizer, chunks: Iterable[str]) -> Iterator[np.ndarray]:
    """Ids, int32 [some] at a time, of the chunks put together."""
    piece, before = Piece(), None
    head, shared = NONE, 0
    for chunk in chain(chunks, [None]):
        piece.text += chunk or ""
        if chunk is not None and len(piece.text) < piece.enough:
            continue
        ids = piece.ids(tokenizer)
        if ids is None:
            # More than what was shared decides on the ids around the border, so it is none.
            assert before is not None, "only a piece after another one expects ids"
            piece, head = Piece(before.text + piece.text[shared:], before.mark), NONE
            ids = piece.ids(tokenizer)
            assert ids is not None, "a piece that began after its mark still does when it is longer"
        yield head
        before, head = None, NONE
        if chunk is None:
            yield ids
        elif (following := _cut(tokenizer, piece.text, ids)) is None:
            piece.enough = 2 * len(piece.text)
        else:
            before, (head, piece) = piece, following
            shared = len(piece.text)


def _cut(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> tuple[np.ndarray, Piece] | None:
    """Near the end of a text, a border of its ids from which on they are the ids of the rest: those before, and the
    rest."""
    first = max(1, len(text) - SHARED)
    for place, mark in product(range(first, min(len(text), first + TRIES)), MARKS):
        rest = _after(tokenizer, mark, text[place:])
        if rest is not None and len(rest) > 1 and _begins_with(ids[::-1], rest[::-1]):
            # What comes after the text decides on the last of them.
            return ids[: -len(rest)], Piece(text[place:], mark, rest[: len(rest) // 2])
    return None


def _after(tokenizer: Tokenizer, mark: str, text: str) -> np.ndarray | None:
    """Ids int32 [tokens] of a text after a mark; None where the mark's own are others there."""
    if not mark:
        return tokenizer.encode(text)
    ids, own = tokenizer.encode(mark + text), tokenizer.encode(mark)
    return ids[len(own) :] if _begins_with(ids, own) else None


def _begins_with(ids: np.ndarray, first: np.ndarray) -> bool:
    return np.array_equal(ids[: len(first)], first)
