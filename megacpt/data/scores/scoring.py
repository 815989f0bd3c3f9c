"""Scores of one piece of a corpus: the work of a scoring process."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np

from megacpt.data.scores.dsir import DsirModel, DsirScorer
from megacpt.data.scores.kenlm_model import PerplexityScorer
from megacpt.data.scores.normalize import Normalization
from megacpt.data.text.documents import Block
from megacpt.data.text.filtering import digests_of, kept_columns, kept_rows
from megacpt.data.text.long_string import LongString
from megacpt.data.text.provenance import Filters
from megacpt.data.text.rows import WrongRow
from megacpt.data.tokens.indexed import IndexedDataset
from megacpt.data.tokens.long_texts import decode_text
from megacpt.data.tokens.tokenizer import load_tokenizer
from megacpt.errors import UserError


@dataclass(frozen=True)
class KenlmSpec:
    """Perplexity under the model at a path, which every worker has to see."""

    model: str
    normalization: Normalization


@dataclass(frozen=True)
class ColumnSpec:
    """A number that the rows came with."""

    name: str


ScorerSpec = KenlmSpec | DsirModel | ColumnSpec
"""How documents are scored, small enough to be sent along with them."""


class TextScorer(Protocol):
    """Scores texts."""

    def score(self, texts: Sequence[str | LongString]) -> np.ndarray:
        """float32 [texts]; infinite for a text without a word."""
        ...


@dataclass(frozen=True)
class BlockTask:
    """Rows of a text file. `spec` is None where scores are known and only digests are wanted."""

    block: Block
    keys: tuple[str, ...]
    filters: Filters
    spec: ScorerSpec | None

    def loaded(self) -> "BlockTask":
        """With the rows themselves."""
        return replace(self, block=self.block.loaded())


@dataclass(frozen=True)
class RangeTask:
    """Documents [start, stop) of a token dataset, to be decoded; `frame` are the ids that hold no text."""

    prefix: str
    start: int
    stop: int
    tokenizer_type: str
    tokenizer_model: str
    frame: frozenset[int]
    spec: KenlmSpec | DsirModel

    def loaded(self) -> "RangeTask":
        """As it is: the dataset is read where it is scored."""
        return self


Task = BlockTask | RangeTask


@dataclass(frozen=True)
class Scored:
    """Scores float32 [documents] of a task, in order.

    Attributes:
        digests: of the documents, uint64 [documents, 2], where duplicates are to be dropped; None elsewhere.
        dropped: rows passed over, by kind.
        consumed, text: bytes of the input, and of its text.
    """

    scores: np.ndarray
    consumed: int
    text: int
    digests: np.ndarray | None = None
    dropped: Counter[str] = field(default_factory=Counter)


@cache
def open_scorer(spec: KenlmSpec | DsirModel) -> TextScorer:
    """The scorer that `spec` describes, opened once in a process."""
    if isinstance(spec, KenlmSpec):
        return PerplexityScorer(Path(spec.model), spec.normalization)
    return DsirScorer(spec)


def run_task(task: Task) -> Scored:
    """Score a piece of a corpus.

    Raises:
        UserError: a bad row, a value that is no number, or a model that cannot be read.
    """
    return _score_block(task) if isinstance(task, BlockTask) else _score_range(task)


def _score_block(task: BlockTask) -> Scored:
    dropped: Counter[str] = Counter()
    block = task.block.loaded()
    if isinstance(task.spec, ColumnSpec):
        rows = list(kept_rows(block, task.keys, task.filters, dropped))
        texts: list[str | LongString] = [text for _, (text, *_) in rows]
        scores = column_values(block, task.spec.name, [where for where, _ in rows])
    else:
        texts = kept_columns(block, task.keys, task.filters, dropped)[0]
        scores = np.empty(0, dtype=np.float32) if task.spec is None else open_scorer(task.spec).score(texts)
    digests = digests_of(texts) if task.filters.dedup == "exact" else None
    return Scored(scores, block.consumed, block.size, digests, dropped)


def _score_range(task: RangeTask) -> Scored:
    texts = decoded(task)
    size = sum(map(len, texts))
    return Scored(open_scorer(task.spec).score(texts), task.stop - task.start, size)


# Opened once in a process.
_dataset = cache(IndexedDataset)
_tokenizer = cache(load_tokenizer)


def decoded(task: RangeTask) -> list[str | LongString]:
    """The texts of documents of a token dataset, without what frames them (BOS, EOS, EOD).

    Raises:
        UserError: a token that the tokenizer does not have.
    """
    dataset = _dataset(task.prefix)
    tokenizer = _tokenizer(task.tokenizer_type, task.tokenizer_model)
    texts = []
    for document in range(task.start, task.stop):
        ids = dataset.read(document)
        first, last = 0, len(ids)
        while first < last and int(ids[last - 1]) in task.frame:
            last -= 1
        while first < last and int(ids[first]) in task.frame:
            first += 1
        outside = (ids < 0) | (ids >= tokenizer.vocab_size)
        if outside.any():
            raise UserError(
                f"{task.prefix}: document {document:,} holds token {int(ids[outside.argmax()])}, but "
                f"{task.tokenizer_model} has {tokenizer.vocab_size:,} tokens; give --tokenizer-model the dataset's own"
            )
        texts.append(decode_text(tokenizer, ids[first:last]))
    return texts


def column_values(block: Block, name: str, places: Sequence[str]) -> np.ndarray:
    """The numbers under `name` in the rows at `places` (FILE:LINE): float32 [places].

    Raises:
        WrongRow: a row has no finite number there.
    """
    lines = block.lines.split(b"\n") if block.columns is None else []
    values = np.empty(len(places), dtype=np.float32)
    for index, where in enumerate(places):
        row = int(where.rpartition(":")[2]) - block.first
        if block.columns is None:
            value = json.loads(lines[row]).get(name)
        else:
            value = block.columns[name][row] if name in block.columns else None
        if value is None:
            words = f"has no number under {name!r}; correct the row or name another --scorer column"
            raise WrongRow(block.file, block.first, row, words)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 3.4e38:
            words = f"the value of {name!r} is no finite number but {value!r}; correct the row"
            raise WrongRow(block.file, block.first, row, words)
        values[index] = value
    return values
