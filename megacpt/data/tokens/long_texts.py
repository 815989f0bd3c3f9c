"""Long texts encoded a piece at a time, to the ids of the whole, so that memory does not grow with a document.

A tokenizer needs several times the memory of what it encodes at once. A long text is cut between two words of plain
letters, or where a line or, in Chinese and Japanese, a clause ends, where next to no tokenizer has a token across;
whether this one has is checked at each cut, on what lies around it. Text without such a place is encoded whole.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from megacpt.data.text.long_string import LongString
from megacpt.data.tokens.tokenizer import Encoded, Tokenizer, sizes_of

LONG = 1 << 21
"""Characters from which a text is encoded in pieces, and of a piece, about."""
CUT = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])|(?<=[^\W_])(?=[\n。，、！？；：])")
AROUND = 1 << 11
"""Characters on each side of a cut that are encoded both ways."""
TRIES = 64
"""Places that are tried in one piece of a text before it is encoded together with the next one."""


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str | LongString], dtype: np.dtype, eod: int | None = None
) -> Encoded:
    """`Tokenizer.encode_flat` of texts framed as the tokenizer frames them, with ids in the dtype of a dataset.

    Args:
        eod: ends every text that has tokens.
    """
    short = [text for text in texts if isinstance(text, str) and len(text) <= LONG]
    if len(short) == len(texts):
        encoded = tokenizer.encode_flat(short, add_special_tokens=True)
        encoded = encoded._replace(ids=encoded.ids.astype(dtype))
        return encoded if eod is None else _with_eod(encoded, eod)
    # Grows in place, as arrays that are put together do not.
    ids = bytearray()
    lengths, sizes = [], []
    for text in texts:
        begun = len(ids)
        for part in _encoded(tokenizer, text):
            ids += part.astype(dtype).data
        if eod is not None and len(ids) > begun:
            ids += np.array([eod], dtype).data
        lengths.append((len(ids) - begun) // dtype.itemsize)
        sizes.append(_text_bytes(text))
    return Encoded(np.frombuffer(ids, dtype), np.array(lengths, np.int32), np.array(sizes))


def _text_bytes(text: str | LongString) -> int:
    if isinstance(text, LongString):
        return text.text_bytes
    return sum(int(sizes_of([chunk])[0]) for chunk in _chunks(text))


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
    for piece in _pieces(tokenizer, _chunks(text)):
        yield tokenizer.encode(piece)
    yield after


def framing(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids int32 that the tokenizer puts before and after a text; None where that is not understood."""
    plain, framed = (tokenizer.encode("a", special).tolist() for special in (False, True))
    starts = [i for i in range(len(framed) - len(plain) + 1) if framed[i : i + len(plain)] == plain]
    if not plain or not starts:
        return None
    return np.array(framed[: starts[0]], np.int32), np.array(framed[starts[0] + len(plain) :], np.int32)


def _chunks(text: str | LongString) -> Iterable[str]:
    """The text, cut anywhere."""
    return text.pieces() if isinstance(text, LongString) else (text[i : i + LONG] for i in range(0, len(text), LONG))


def _pieces(tokenizer: Tokenizer, chunks: Iterable[str]) -> Iterator[str]:
    """Pieces whose ids, end to end, are those of the chunks put together."""
    held: list[str] = []
    for chunk in chunks:
        spaces = (match.start() for match in islice(CUT.finditer(chunk, len(chunk) // 2, len(chunk) - AROUND), TRIES))
        found = next(filter(None, (_cut(tokenizer, chunk, space) for space in spaces)), None)
        if found is None:
            held.append(chunk)
            continue
        end, following = found
        yield "".join([*held, chunk[:end]])
        held = [chunk[following:]]
    yield "".join(held)


def _cut(tokenizer: Tokenizer, text: str, place: int) -> tuple[int, int] | None:
    """Where the piece before a place ends and the next one begins: there, or after a space where the tokenizer itself
    puts one before a text. None where the two do not have the ids of the whole."""
    first, last = max(0, place - AROUND), place + AROUND
    whole = tokenizer.encode(text[first:last])
    left = tokenizer.encode(text[first:place])
    for following in (place, place + 1):
        if np.array_equal(whole, np.concatenate([left, tokenizer.encode(text[following:last])])):
            return place, following
    return None
