"""The reference tokenizers' ids, many times faster, by gigatoken; or the reference itself, with a word why.

A fast tokenizer has to reproduce the reference on built-in texts before it is used, and on the first real text it is
given. Four kinds of text go to the reference for good: those with a byte that the vocabulary lacks, those with a
character that Unicode had not assigned (libraries of other years class it otherwise), those that are not in NFC where
added tokens are looked for in NFC, and all text after a difference.
"""

import mmap
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

from megacpt.data.tokens.fast_definition import Definition, Unsuited, from_sentencepiece, from_tokenizer_json
from megacpt.data.tokens.long_texts import framing
from megacpt.data.tokens.tokenizer import (
    Encoded,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    sizes_of,
)
from megacpt.data.tokens.versions import installed_version
from megacpt.errors import UserError

ENGINES = ("auto", "fast", "reference")
FIRST_TEXT = 1 << 16
"""Characters of real text that both tokenizers encode before one is believed."""
CACHE_BYTES = 64 << 20
"""Memory that gigatoken's caches, which it never empties, may take before it is built anew; more is no faster."""

SAMPLES = (
    "",
    " ",
    "\n",
    "a",
    "The patient was given 1234567 mg (0.5 %/day); p<0.05, n=12,345.\r\n\r\n  It's, IT'S, they'll THEY'LL o’s 's'S'T\n",
    "    def f(self, *args):\n\t\treturn {'a': [1, 2]}  # ---- ==== ....!!??\n\n\n\n   \n x",
    "https://example.org/a_b-c?d=e&f=%20#g user@example.org C++ C# $1,000.00 50% ~/x\\y <b>bold</b> <|x|> [INST] </ s>",
    "Größe Straße façade naïve œuvre İstanbul ı ſ K ß Å Å e\u0301 n\u0303 \u0301\u0301a ﬁ ½ ² ① Ⅷ ٣٤٥ १२३ 𝟙𝟚",
    "Пациент получил лечение. Ο ασθενής έλαβε. החולה קיבל. تلقى المريض العلاج. रोगी को उपचार मिला। ผู้ป่วยได้รับการรักษา",
    "患者接受了治疗。患者は治療を受けた。환자는 치료를 받았다. 𠀀𠀁 ",
    "👩‍⚕️ 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 1️⃣ ☃️ \u200b\u200d\u00ad\ufeff \u00a0\u2003\u3000\u2028\u2029\u0085 a\u00a0b",
    "\x00\x01\x04\x07\x0b\x0c\x1b\x7f\x80\x9f \ufdd0 \ufffe \ufffd \ue000 \U0010ffff",
    "".join(map(chr, range(0x20, 0x250))),
    "".join(f"{mark * n}x" for mark in " \n\t1a.=é本" for n in (2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 64, 100)),
)
"""Texts that tell tokenizers apart: scripts, marks, white space, numbers, control and unassigned characters, runs."""


def open_tokenizer(type_name: str, path: str | Path, engine: str = "auto") -> Tokenizer:
    """Open a tokenizer that encodes a corpus.

    Args:
        engine: "reference" is `load_tokenizer`; "auto" is the fast one where there is one that equals the reference,
            and says on stderr where there is not; "fast" makes that an error.

    Raises:
        UserError: as `load_tokenizer`; or "fast" cannot be had.
    """
    reference = load_tokenizer(type_name, path)
    if engine == "reference":
        return reference
    try:
        assert isinstance(reference, HuggingFaceTokenizer | SentencePieceTokenizer)
        return FastTokenizer(reference, may_fall_back=engine == "auto")
    except Unsuited as reason:
        if engine == "fast":
            raise UserError(
                f"{path}: no fast engine for this tokenizer ({reason}); pass --tokenizer-engine auto"
            ) from reason
        _warn(reference, str(reason))
        return reference


def chosen_engine(tokenizer: Tokenizer) -> str:
    """The `engine` with which another process opens this very tokenizer, or fails."""
    return "fast" if isinstance(tokenizer, FastTokenizer) and not tokenizer.fallen else "reference"


def _warn(reference: Tokenizer, reason: str) -> None:
    print(
        f"warning: text is encoded by {reference.engine}, at about 3 MB/s a core and so 30 times slower than by "
        f"gigatoken, which cannot be used: {reason}",
        file=sys.stderr,
        flush=True,
    )


class FastTokenizer:
    """A tokenizer that encodes with gigatoken what its reference would encode the same way.

    Attributes:
        fallen: whether a difference was found in real text, and the reference encodes.

    Raises:
        Unsuited: gigatoken is missing, cannot run this tokenizer, or differs from the reference.
    """

    def __init__(self, reference: HuggingFaceTokenizer | SentencePieceTokenizer, may_fall_back: bool) -> None:
        self.type, self.sha256 = reference.type, reference.sha256
        self.vocab_size, self.eod_id = reference.vocab_size, reference.eod_id
        self._reference = reference
        self._may_fall_back = may_fall_back
        self.fallen = False
        self._unproven = FIRST_TEXT
        self._characters = Characters()
        self._definition = _definition(reference)
        texts = [*SAMPLES, *reference.special_tokens, *self._definition.samples]
        with _breakage_is_unsuited():
            self._build()
            self.engine = f"gigatoken {installed_version('gigatoken')}"
            frame = framing(reference)
            if frame is None:
                raise Unsuited("how it frames a text is not understood")
            self._frame = tuple(ids.view(np.uint32) for ids in frame)
            difference = self._difference(texts, False) or self._difference(SAMPLES, True)
        if difference:
            raise Unsuited(difference)

    def settled(self) -> "FastTokenizer":
        """The same for a process that may not choose: to it a difference is an error."""
        other = copy(self)
        other._may_fall_back = False
        return other

    def encode(self, text: str, add_special_tokens: bool = False) -> np.ndarray:
        return self.encode_flat([text], add_special_tokens)[0]

    def encode_flat(self, texts: Sequence[str], add_special_tokens: bool = False) -> Encoded:
        if self._unproven > 0 and not self.fallen:
            self._prove(texts, add_special_tokens)
        if self.fallen:
            return self._reference.encode_flat(texts, add_special_tokens)
        result = self._encode(texts, add_special_tokens)
        if _resident_bytes() > self._resident + CACHE_BYTES:
            self._build()
        return result

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._reference.decode(ids)

    def _build(self) -> None:
        self._engine: Any = None
        self._engine = _gigatoken(self._definition)
        self._resident = _resident_bytes()

    def _encode(self, texts: Sequence[str], framed: bool) -> Encoded:
        encode = self._engine.encode
        wide = {i: text.encode("utf-8") for i, text in enumerate(texts) if not text.isascii()}
        again = [list(wide)[i] for i in self._characters.doubtful(list(wide.values()))]
        if self._definition.composed:
            again += [i for i in wide if not unicodedata.is_normalized("NFC", texts[i])]
        content: list[str | bytes] = [wide.get(i, text) for i, text in enumerate(texts)]
        ids, text_bytes = list(map(encode, content)), sizes_of(content)
        flat, lengths = _joined(ids)
        if len(flat) and flat.max() >= self.vocab_size:
            again += [i for i, own in enumerate(ids) if len(own) and own.max() >= self.vocab_size]
        for i in again:
            ids[i] = self._reference.encode(texts[i]).view(np.uint32)
        before, after = self._frame
        if framed and len(before) + len(after):
            flat, _ = _joined([part for own in ids for part in (before, own, after)])
            lengths = np.fromiter(map(len, ids), np.int32, len(ids)) + np.int32(len(before) + len(after))
            return Encoded(flat, lengths, text_bytes)
        return Encoded(*(_joined(ids) if again else (flat, lengths)), text_bytes)

    def _difference(self, texts: Sequence[str], framed: bool) -> str | None:
        """Where the two tokenizers differ on these texts, in words."""
        expected, found = self._reference.encode_flat(texts, framed), self._encode(texts, framed)
        if all(map(np.array_equal, expected, found)):
            return None
        for text in texts:
            if self._reference.encode(text, framed).tolist() != self._encode([text], framed)[0].tolist():
                return f"its ids of {text[:40]!r} differ from those of {self._reference.engine}"
        return f"its ids differ from those of {self._reference.engine}"

    def _prove(self, texts: Sequence[str], framed: bool) -> None:
        """Compare the two on the first real text; a difference ends the use of gigatoken."""
        first = []
        for text in texts:
            if self._unproven <= 0:
                break
            first.append(text[: self._unproven])
            self._unproven -= len(text)
        difference = self._difference(first, framed)
        if difference is None:
            return
        if not self._may_fall_back:
            raise UserError(f"{self.engine}: {difference}; run again with --tokenizer-engine reference")
        _warn(self._reference, difference)
        self.fallen, self.engine = True, self._reference.engine


class Characters:
    """Which characters any library of Unicode classifies alike: those assigned in the Unicode of this Python.

    A character that is not may be a letter to one library and none to another, which moves the borders of words.
    Below U+0800 all libraries agree.
    """

    def __init__(self) -> None:
        self._agreed = np.zeros(sys.maxunicode + 1, dtype=bool)

    def doubtful(self, texts: Sequence[bytes]) -> list[int]:
        """Indices, ascending, of the UTF-8 texts that hold a character which is not agreed on."""
        data = np.frombuffer(b"".join(texts), dtype=np.uint8)
        starts = np.flatnonzero(data >= 0xE0)
        if not len(starts):
            return []
        first, *rest = (data.take(starts + i, mode="clip").astype(np.int32) for i in range(4))
        second, third, fourth = (byte & 0x3F for byte in rest)
        three = (first & 0x0F) << 12 | second << 6 | third
        codes = np.where(first < 0xF0, three, (first & 0x07) << 18 | second << 12 | third << 6 | fourth)
        if self._agreed[codes].all():
            return []
        # A set rather than np.unique, whose first call imports numpy.ma: some 40 ms in every process.
        for code in set(codes[~self._agreed[codes]].tolist()):
            self._agreed[code] = unicodedata.category(chr(code)) != "Cn"
        ends = np.cumsum(np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)))
        return sorted(set(np.searchsorted(ends, starts[~self._agreed[codes]], side="right").tolist()))


def _joined(ids: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, ids), dtype=np.int32, count=len(ids))
    return np.concatenate([np.empty(0, np.uint32), *ids]).view(np.int32), lengths


def _definition(reference: HuggingFaceTokenizer | SentencePieceTokenizer) -> Definition:
    if isinstance(reference, HuggingFaceTokenizer):
        return from_tokenizer_json(reference)
    return from_sentencepiece(reference)


def _gigatoken(definition: Definition) -> Any:
    try:
        from gigatoken.gigatoken_rs import load_hf_json
    except ImportError as error:
        raise Unsuited("it is not installed (pip install gigatoken)") from error
    return load_hf_json(definition.content)


@contextmanager
def _breakage_is_unsuited() -> Iterator[None]:
    """The library raises RuntimeError, or panics with what is no Exception, at what it cannot do."""
    try:
        yield
    except (Unsuited, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise Unsuited(next(iter(str(error).splitlines()), type(error).__name__)) from error


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as handle:
        return int(handle.read().split()[1]) * mmap.PAGESIZE
