"""Text to the words that an n-gram model counts, as CCNet normalises it (Wenzek et al. 2019, arXiv 1911.00359).

In order: lower case; accents off (canonical decomposition without non-spacing marks); every digit a 0; typographic
punctuation to its ASCII form; control characters out. A document is cut into sentences at line feeds, a sentence into
words at white space. Where this departs from CCNet's own code: white space of any kind (tab, no-break space) separates
words instead of being deleted or kept inside one; lines without a word are left out instead of scored; a full-width 1
is a digit, not a quotation mark; and the words <s>, </s> and <unk>, which a model knows as marks, are left out.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import filterfalse, pairwise
from typing import Any, NamedTuple

import numpy as np

from megacpt.data.scores.beyond_ascii import CONTROL, BeyondAscii

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
EDGE = b"\n\0\n"
"""What documents are joined with: NUL is a line of its own, and in no normalised text."""
MARKS = (b"<s>", b"</s>", b"<unk>", b"<UNK>")
"""Words of the text that KenLM would take for a sentence's edge or for every unknown word."""
MARK_AS_WORD = re.compile(rb"(?<![^ \n\0])(?:</?s>|<unk>|<UNK>)(?![^ \n\0])")


class Sentences(NamedTuple):
    """A normalised document: its sentences in UTF-8, none without a word, and how many words they hold together."""

    lines: list[bytes]
    words: int


Normalizer = Callable[[Sequence[str]], list[Sentences]]
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
    table, beyond = _ascii_table(rules), BeyondAscii(_replacement(rules))

    def normalize(texts: Sequence[str]) -> list[Sentences]:
        if not texts:
            return []
        joined = EDGE.join([text.encode() for text in texts])
        data = _without_marks(beyond.replaced(joined.translate(table)).replace(CONTROL, b""))
        words = _word_counts(data)
        if len(words) > len(texts):
            return normalize([text.replace("\0", "") for text in texts])
        lines, start = data.split(b"\n"), 0
        documents: list[Sentences] = []
        for count in words:
            end = lines.index(b"\0", start) if len(documents) + 1 < len(words) else len(lines)
            documents.append(Sentences(list(filterfalse(bytes.isspace, filter(None, lines[start:end]))), count))
            start = end + 1
        return documents

    return normalize


def _ascii_table(rules: Normalization) -> bytes:
    table = bytearray(range(256))
    for byte in (*range(1, 32), 127):
        if byte != ord("\n"):
            table[byte] = ord(" ") if byte in BLANKS else CONTROL[0]
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
    places = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("<")).tolist()
    if not any(data.startswith(MARKS, place) for place in places):
        return data
    return MARK_AS_WORD.sub(b"", data)


def _word_counts(data: bytes) -> list[int]:
    """Words of each of the documents that NUL separates."""
    characters = np.frombuffer(data, dtype=np.uint8)
    inside = np.concatenate([[False], characters > ord(" ")])
    begins = inside[1:] > inside[:-1]
    ends = [*np.flatnonzero(characters == 0).tolist(), len(characters)]
    return [int(np.count_nonzero(begins[start:end])) for start, end in pairwise([0, *ends])]
