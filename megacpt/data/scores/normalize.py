"""Text to the words that an n-gram model counts, as CCNet normalises it (Wenzek et al. 2019, arXiv 1911.00359).

In order: lower case; accents off (canonical decomposition without non-spacing marks); every digit a 0; typographic
punctuation to its ASCII form; control characters out. A document is cut into sentences at line feeds, a sentence into
words at white space. Where this departs from CCNet's own code: white space of any kind (tab, no-break space) separates
words instead of being deleted or kept inside one; lines without a word are left out instead of scored; a full-width 1
is a digit, not a quotation mark; and the words <s>, </s> and <unk>, which a model knows as marks, are left out.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import batched, chain, compress, filterfalse, pairwise
from typing import Any, NamedTuple

import numpy as np

from megacpt.data.scores.beyond_ascii import BeyondAscii
from megacpt.data.text.long_string import LongString, chunks_of, cut_at

PUNCTUATION = ("map", "remove", "keep")
ASCII_FORM = {
    **dict.fromkeys("„”“«»」「《》", '"'),
    **dict.fromkeys("´’", "'"),
    **dict.fromkeys("，、", ","),
    **dict.fromkeys("∶：", ":"),
    **dict.fromkeys("–━►", "-"),
    "—": " - ",
    "。": ".",
    "．": ". ",
    "…": "...",
    "？": "?",
    "！": "!",
    "（": "(",
    "）": ")",
    "；": ";",
    "～": "~",
    "〈": "<",
    "〉": ">",
    "【": "[",
    "】": "]",
    "％": "%",
}
BLANKS = b"\t\x0b\x0c\r\x1c\x1d\x1e\x1f"
CONTROLS = bytes({*range(1, 32), 127} - {*BLANKS, ord("\n")})
EDGE = b"\n\0\n"
"""What documents are joined with: NUL is a line of its own, and in no normalised text."""
MARKS = (b"<s>", b"</s>", b"<unk>", b"<UNK>")
"""Words of the text that KenLM would take for a sentence's edge or for every unknown word."""
MARK_AS_WORD = re.compile(rb"(?<![^ \n\0])(?:" + b"|".join(MARKS) + rb")(?![^ \n\0])")
SECOND_OF_MARKS = np.isin(np.arange(256), [mark[1] for mark in MARKS])
LONG = 1 << 21
"""Characters from which a text is worked through in pieces, and of a piece, about."""


class Sentences(NamedTuple):
    """A normalised document: its sentences in UTF-8, none without a word, and how many words they hold together."""

    lines: list[bytes]
    words: int


Normalizer = Callable[[Sequence[str | LongString]], list[Sentences]]
"""Documents to their sentences; the larger the batch, the faster."""


@dataclass(frozen=True)
class Normalization:
    """What is done to a text before its words are counted; the defaults are CCNet's.

    Attributes:
        lowercase: every letter in lower case.
        strip_accents: é becomes e.
        digits_to_zero: every decimal digit becomes 0.
        punctuation: typographic marks: "map" to ASCII, "remove", or "keep". ASCII punctuation always stays.
    """

    lowercase: bool = True
    strip_accents: bool = True
    digits_to_zero: bool = True
    punctuation: str = "map"

    def __post_init__(self) -> None:
        if self.punctuation not in PUNCTUATION:
            raise ValueError(f"punctuation is {self.punctuation!r}; choose one of {', '.join(PUNCTUATION)}")

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return asdict(self)

    def spelled(self) -> str:
        """As `spelled_normalization` reads it: the steps that are taken, and what becomes of punctuation."""
        steps = [name for name, value in self.as_dict().items() if value is True]
        return ",".join([*steps, f"punctuation={self.punctuation}"])


def spelled_normalization(text: str) -> Normalization:
    """`ccnet` for the defaults; or the steps to take, `lowercase,digits_to_zero,punctuation=keep`, the others left out.

    Raises:
        ValueError: an unknown step.
    """
    if text == "ccnet":
        return Normalization()
    steps = {field.name: False for field in fields(Normalization) if field.default is True}
    punctuation = "keep"
    for word in filter(None, text.split(",")):
        if word.startswith("punctuation="):
            punctuation = word.partition("=")[2]
        elif word in steps:
            steps[word] = True
        else:
            raise ValueError(f"{word!r} is not one of ccnet, {', '.join(steps)}, punctuation={'|'.join(PUNCTUATION)}")
    return Normalization(**steps, punctuation=punctuation)


def normalization_from(values: Any) -> Normalization:
    """What `as_dict` wrote.

    Raises:
        ValueError: a field is missing, unknown or of the wrong type.
    """
    expected = {field.name: type(field.default) for field in fields(Normalization)}
    if not isinstance(values, dict) or {key: type(value) for key, value in values.items()} != expected:
        raise ValueError(f"not a normalisation: {values!r}")
    return Normalization(**values)


def normalizer(rules: Normalization) -> Normalizer:
    """The function that `rules` describe.

    Documents are joined and translated as bytes; only what lies beyond ASCII is looked at character by character. So
    each character is normalised by itself: a capital sigma that ends a word becomes the ordinary small sigma.
    """
    beyond, table = BeyondAscii(_replacement(rules)), _ascii_table(rules)

    def translated(text: bytearray) -> bytes:
        # What is put for a character beyond ASCII is what the table leaves as it is, or deletes.
        return bytes(beyond.replace(text).translate(table, CONTROLS))

    def together(texts: Sequence[str]) -> list[Sentences]:
        if not texts:
            return []
        data = _without_marks(translated(bytearray(EDGE).join([text.encode() for text in texts])))
        words = _word_counts(data)
        if len(words) > len(texts):
            return together([text.replace("\0", "") for text in texts])
        lines, start = data.split(b"\n"), 0
        blank = b"\n " in data or data.startswith(b" ")
        documents: list[Sentences] = []
        for count in words:
            end = lines.index(b"\0", start) if len(documents) + 1 < len(words) else len(lines)
            filled = filter(None, lines[start:end])
            documents.append(Sentences(list(filterfalse(bytes.isspace, filled) if blank else filled), count))
            start = end + 1
        return documents

    def in_pieces(text: str | LongString) -> Sentences:
        return _sentences(translated(bytearray(piece.replace("\0", "").encode())) for piece in chunks_of(text, LONG))

    def normalize(texts: Sequence[str | LongString]) -> list[Sentences]:
        short = [isinstance(text, str) and len(text) <= LONG for text in texts]
        found = iter(together([str(text) for text in compress(texts, short)]))
        return [next(found) if is_short else in_pieces(text) for text, is_short in zip(texts, short, strict=True)]

    return normalize


def _sentences(pieces: Iterable[bytes]) -> Sentences:
    """Of one document, whose translated text comes in pieces that may end amid a word."""
    lines: list[bytes] = []
    words, line = 0, []
    for part in cut_at(pieces, _after_a_blank, b""):
        words += _words_in(part := _without_marks(part))
        first, *rest = part.split(b"\n")
        line.append(first)
        for following in rest:
            lines.append(b"".join(line))
            line = [following]
    lines.append(b"".join(line))
    return Sentences([line for line in lines if line and not line.isspace()], words)


def _after_a_blank(piece: bytes) -> int:
    """A place of normalised text that is within no word."""
    return 1 + max(piece.rfind(b" "), piece.rfind(b"\n"))


def _ascii_table(rules: Normalization) -> bytes:
    """What becomes of each byte, those of CONTROLS left as they are."""
    table = bytearray(range(256))
    for byte in BLANKS:
        table[byte] = ord(" ")
    if rules.lowercase:
        table[ord("A") : ord("Z") + 1] = bytes(range(ord("a"), ord("z") + 1))
    if rules.digits_to_zero:
        table[ord("0") : ord("9") + 1] = b"0" * 10
    return bytes(table)


def _replacement(rules: Normalization) -> Callable[[str], str]:
    """What becomes of a character beyond ASCII."""

    def part(character: str) -> str:
        category = unicodedata.category(character)
        if rules.strip_accents and category == "Mn":
            return ""
        if rules.digits_to_zero and category == "Nd":
            return "0"
        if rules.punctuation != "keep" and character in ASCII_FORM:
            return ASCII_FORM[character] if rules.punctuation == "map" else ""
        if character.isspace():
            return " "
        return "" if category == "Cc" else character

    def replacement(character: str) -> str:
        lower = character.lower() if rules.lowercase else character
        return "".join(map(part, unicodedata.normalize("NFD", lower) if rules.strip_accents else lower))

    return replacement


def _without_marks(data: bytes) -> bytes:
    """The text without MARKS where they stand as whole words."""
    characters = np.frombuffer(data, dtype=np.uint8)
    found_in = (at + np.flatnonzero(characters[at : at + LONG] == ord("<")) for at in range(0, len(data), LONG))
    places = np.concatenate([np.empty(0, np.int64), *found_in])
    # Text such as HTML is full of "<", and few of them begin a mark.
    places = places[SECOND_OF_MARKS[characters.take(places + 1, mode="clip")]]
    found = [match.span() for place in places.tolist() if (match := MARK_AS_WORD.match(data, place))]
    edges = [0, *chain.from_iterable(found), len(data)]
    return b"".join([data[start:stop] for start, stop in batched(edges, 2)]) if found else data


def _word_counts(data: bytes) -> list[int]:
    """Words of each of the documents that NUL separates."""
    inside = np.frombuffer(data, dtype=np.uint8) > ord(" ")
    begins = np.empty_like(inside)
    begins[:1] = inside[:1]
    np.greater(inside[1:], inside[:-1], out=begins[1:])
    edges = [0, *_places(data, b"\0"), len(data)]
    return [int(np.count_nonzero(begins[start:end])) for start, end in pairwise(edges)]


def _words_in(data: bytes) -> int:
    """Words of one document, without the memory of `_word_counts`."""
    characters, count, before = np.frombuffer(data, dtype=np.uint8), 0, False
    for at in range(0, len(data), LONG):
        inside = characters[at : at + LONG] > ord(" ")
        count += int(inside[0] and not before) + int(np.count_nonzero(inside[1:] > inside[:-1]))
        before = bool(inside[-1])
    return count


def _places(data: bytes, byte: bytes) -> Iterator[int]:
    place = data.find(byte)
    while place >= 0:
        yield place
        place = data.find(byte, place + 1)
