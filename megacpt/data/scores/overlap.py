"""Whether a text contains an evaluation set's items: n-grams of words that both have (GPT-3's check, arXiv 2005.14165).

Words are runs of letters, digits and underscores in lower case. An item overlaps when any of its strings shares N
consecutive words with the text: 13 by default, for shorter runs are phrases that everybody writes. An item without a
string of N words cannot be told from ordinary language; a report counts these.
"""

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megacpt.errors import UserError
from megacpt.files import sha256_of

NGRAM, FEWEST = 13, 5
NAMED = 5
"""How many overlapping items a report names."""
WORD = re.compile(r"\w+")
BASE = np.uint64(0x9E3779B97F4A7C15)
MOST_WORDS = 1 << 20


@dataclass(frozen=True)
class EvalOverlap:
    """What an evaluation set and a reference share.

    Attributes:
        name, sha256: of the evaluation set's file.
        items: its items; `too_short` of them have no string of `ngram` words.
        overlapping: items found in the reference.
        examples: the first of them, as FILE:LINE (or FILE:KEY).
    """

    name: str
    sha256: str
    ngram: int
    items: int
    too_short: int
    overlapping: int
    examples: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return asdict(self)

    def sentence(self) -> str:
        """One line for a person."""
        found = f"{self.overlapping:,} of {self.items:,} items"
        if not self.overlapping:
            return f"{self.name}: none of {self.items:,} items ({self.too_short:,} are too short to tell)"
        more = ", ..." if self.overlapping > len(self.examples) else ""
        return f"{self.name}: {found} share {self.ngram} words in a row: {', '.join(self.examples)}{more}"


class _WordHashes(dict[str, int]):
    """64-bit hashes of words, worked out once."""

    def __missing__(self, word: str) -> int:
        digest = blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        found = self[word] = int.from_bytes(digest, "little")
        return found

    def of(self, text: str) -> np.ndarray:
        """uint64 [words of the text]."""
        if len(self) > MOST_WORDS:
            self.clear()
        words = WORD.findall(text.lower())
        return np.fromiter(map(self.__getitem__, words), dtype=np.uint64, count=len(words))


def ngram_hashes(words: np.ndarray, length: int) -> np.ndarray:
    """Hashes of every `length` consecutive words: uint64 [words - length + 1], none if there are fewer."""
    count = max(0, len(words) - length + 1)
    found = np.zeros(count, dtype=np.uint64)
    for place in range(length):
        found = found * BASE + words[place : place + count]
    return found ^ (found >> np.uint64(29))


class Evaluation:
    """Evaluation sets to look for in texts.

    Args:
        keys: look at the strings under these keys of an item alone; by default at all of them.

    Raises:
        UserError: a file cannot be read, or holds no item.
    """

    def __init__(self, paths: Sequence[Path], ngram: int = NGRAM, keys: Sequence[str] = ()) -> None:
        if ngram < FEWEST:
            raise UserError(f"{ngram} words are too few to tell overlap from ordinary language; use at least {FEWEST}")
        self._ngram, self._words, self._paths = ngram, _WordHashes(), list(paths)
        self._names: list[list[str]] = [[] for _ in paths]
        self._short = [0] * len(paths)
        hashes, owners = [], []
        for number, path in enumerate(paths):
            before = sum(map(len, self._names))
            for item, (name, strings) in enumerate(read_items(path, keys), start=before):
                found = [ngram_hashes(self._words.of(string), ngram) for string in strings]
                self._short[number] += not any(map(len, found))
                self._names[number].append(name)
                hashes += found
                owners += [np.full(len(grams), item) for grams in found]
            if not self._names[number]:
                raise UserError(f"{path}: this evaluation set holds no item; check --eval-set")
        grams = np.concatenate([np.empty(0, np.uint64), *hashes])
        order = np.argsort(grams, kind="stable")
        self._grams, self._owners = grams[order], np.concatenate([np.empty(0, int), *owners])[order]
        self._found = np.zeros(sum(map(len, self._names)), dtype=bool)

    def look_in(self, text: str) -> None:
        """Note the items that this text contains."""
        hashes = ngram_hashes(self._words.of(text), self._ngram)
        low = np.searchsorted(self._grams, hashes)
        hit = low < len(self._grams)
        hit[hit] = self._grams[low[hit]] == hashes[hit]
        for first in np.unique(low[hit]).tolist():
            last = np.searchsorted(self._grams, self._grams[first], side="right")
            self._found[self._owners[first:last]] = True

    def report(self) -> list[EvalOverlap]:
        """One entry per evaluation set."""
        entries, start = [], 0
        for path, names, short in zip(self._paths, self._names, self._short, strict=True):
            hits = np.flatnonzero(self._found[start : start + len(names)]).tolist()
            examples = [names[hit] for hit in hits[:NAMED]]
            entries.append(EvalOverlap(path.name, sha256_of(path), self._ngram, len(names), short, len(hits), examples))
            start += len(names)
        return entries


def read_items(path: Path, keys: Sequence[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """Items of an evaluation set as (name, strings): rows of .jsonl, or the members of one JSON object or list.

    Either may be gzipped. Every string inside an item counts, at whatever depth, or those under `keys`.

    Raises:
        UserError: the file is missing or neither of these.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: this evaluation set cannot be read ({error}); check --eval-set") from error
    for place, value in _members(path, content):
        if keys and isinstance(value, dict):
            value = [value[key] for key in keys if key in value]
        yield f"{path.name}:{place}", list(_strings(value))


def _members(path: Path, content: bytes) -> Iterator[tuple[Any, Any]]:
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    try:
        return iter([(number, orjson.loads(line)) for number, line in lines])
    except orjson.JSONDecodeError as by_line:
        try:
            whole = orjson.loads(content)
        except orjson.JSONDecodeError:
            raise UserError(f"{path}: neither JSON nor JSON Lines ({by_line}); check --eval-set") from by_line
    return iter(whole.items()) if isinstance(whole, dict) else iter(enumerate(whole, start=1))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
