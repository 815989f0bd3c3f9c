"""Long texts encoded a piece at a time, to the ids of the whole, so that memory does not grow with a document.

A tokenizer needs several times the memory of what it encodes at once. A long text is cut between two words of plain
letters, where next to no tokenizer has a token across; whether this one has is checked at each cut, on what lies around
it. Text without such a place is encoded whole.
"""

import re
from collections.abc import Iterator
from itertools import islice

import numpy as np

from megacpt.data.tokens.tokenizer import Encoded, Tokenizer, sizes_of

LONG = 1 << 23
"""Characters from which a text is encoded in pieces, and of a piece, about."""
CUT = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
AROUND = 1 << 11
"""Characters on each side of a cut that are encoded both ways."""
TRIES = 64
"""Places that are tried before the rest of a text is encoded whole."""


def encode_texts(tokenizer: Tokenizer, texts: list[str], dtype: np.dtype) -> Encoded:
    """`Tokenizer.encode_flat` of texts framed as the tokenizer frames them, with ids in the dtype of a dataset."""
    if not any(len(text) > LONG for text in texts):
        encoded = tokenizer.encode_flat(texts, add_special_tokens=True)
        return encoded._replace(ids=encoded.ids.astype(dtype))
    parts = [_encode(tokenizer, text, dtype) for text in texts]
    sizes = [int(sizes_of([text[at : at + LONG] for at in range(0, len(text), LONG)]).sum()) for text in texts]
    return Encoded(np.concatenate(parts), np.fromiter(map(len, parts), np.int32, len(parts)), np.array(sizes))


def _encode(tokenizer: Tokenizer, text: str, dtype: np.dtype) -> np.ndarray:
    frame = framing(tokenizer) if len(text) > LONG else None
    if frame is None:
        return tokenizer.encode(text, add_special_tokens=True).astype(dtype)
    before, after = (ids.astype(dtype) for ids in frame)
    pieces = (tokenizer.encode(piece).astype(dtype) for piece in _pieces(tokenizer, text))
    return np.concatenate([before, *pieces, after])


def framing(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids int32 that the tokenizer puts before and after a text; None where that is not understood."""
    plain, framed = (tokenizer.encode("a", special).tolist() for special in (False, True))
    starts = [i for i in range(len(framed) - len(plain) + 1) if framed[i : i + len(plain)] == plain]
    if not plain or not starts:
        return None
    return np.array(framed[: starts[0]], np.int32), np.array(framed[starts[0] + len(plain) :], np.int32)


def _pieces(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """Pieces whose ids, end to end, are those of the text."""
    start = 0
    while len(text) - start > LONG:
        spaces = (match.start() for match in islice(CUT.finditer(text, start + LONG), TRIES))
        found = next(filter(None, (_cut(tokenizer, text, space) for space in spaces)), None)
        if found is None:
            break
        end, following = found
        yield text[start:end]
        start = following
    yield text[start:]


def _cut(tokenizer: Tokenizer, text: str, space: int) -> tuple[int, int] | None:
    """Where the piece before a space ends and the next one begins: with it, or after it where the tokenizer itself puts
    one before a text. None where the two do not have the ids of the whole."""
    first, last = max(0, space - AROUND), space + AROUND
    whole = tokenizer.encode(text[first:last])
    left = tokenizer.encode(text[first:space])
    for following in (space, space + 1):
        if np.array_equal(whole, np.concatenate([left, tokenizer.encode(text[following:last])])):
            return space, following
    return None
