"""What can be scored, piece by piece: rows of text files, or the decoded documents of a token dataset."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megacpt.data.scores.scoring import BlockTask, ColumnSpec, RangeTask, ScorerSpec, Task, decoded
from megacpt.data.text.documents import Source
from megacpt.data.text.filtering import kept_columns
from megacpt.data.text.inputs import find_inputs
from megacpt.data.text.long_string import LongString
from megacpt.data.text.provenance import Filters
from megacpt.data.tokens.indexed import IndexedDataset
from megacpt.data.tokens.manifest import Manifest, TokenizerInfo, dataset_files, read_manifest
from megacpt.data.tokens.tokenizer import TOKENIZER_TYPES, load_tokenizer
from megacpt.errors import UserError

TOKENS_AT_ONCE = 1 << 17
BYTES_PER_TOKEN = 4


class Corpus(Protocol):
    """What is scored.

    Attributes:
        size: of all of it, in the unit of `Scored.consumed`.
        files: that it is read from.
    """

    size: int
    files: list[Path]

    @property
    def filters(self) -> Filters | None:
        """Which rows are documents; None where there are no rows."""
        ...

    def identity(self) -> dict[str, Any]:
        """Tells this corpus from another before it is read."""
        ...

    def tasks(self, spec: ScorerSpec, done: int) -> Iterator[tuple[Task | None, int]]:
        """(task, consumed) of each piece in order; for the first `done`, a task without scoring, or none."""
        ...

    def described(self) -> dict[str, Any]:
        """`inputs`, `json_keys`, `filters` and `dataset` of the manifest, once all tasks were taken."""
        ...

    def sample(self, most_bytes: int) -> Iterator[str | LongString]:
        """Texts of pieces that are evenly spaced, about `most_bytes` of them."""
        ...


class TextFiles:
    """Rows of text files. The first key's text is scored; a row counts only if it has all of them."""

    def __init__(self, inputs: tuple[str, ...], keys: tuple[str, ...], filters: Filters) -> None:
        self._sources = [Source(path) for path in find_inputs(inputs)]
        self._keys, self._filters = keys, filters
        self.size = sum(source.size for source in self._sources)
        self.files = [source.path for source in self._sources]

    @property
    def filters(self) -> Filters:
        return self._filters

    def identity(self) -> dict[str, Any]:
        files = [(str(source.path.resolve()), source.size, source.mtime_ns) for source in self._sources]
        return {"files": files, "keys": self._keys, "filters": asdict(self.filters)}

    def tasks(self, spec: ScorerSpec, done: int) -> Iterator[tuple[BlockTask | None, int]]:
        columns = [*self._keys, *([spec.name] if isinstance(spec, ColumnSpec) else [])]
        number = 0
        for source in self._sources:
            for block in source.pieces(columns):
                again = number < done
                task = BlockTask(block, self._keys, self.filters, None if again else spec)
                yield (None if again and self.filters.dedup == "none" else task), block.consumed
                number += 1

    def described(self) -> dict[str, Any]:
        inputs = [asdict(source.record()) for source in self._sources]
        return {"inputs": inputs, "json_keys": list(self._keys), "filters": asdict(self.filters), "dataset": None}

    def sample(self, most_bytes: int) -> Iterator[str | LongString]:
        """The texts of every n-th block, so many that their files' bytes are about `most_bytes`."""
        step = max(1, -(-self.size // most_bytes))
        blocks = (block for source in self._sources for block in source.blocks(self._keys))
        for number, block in enumerate(blocks):
            if number % step == 0:
                yield from kept_columns(block, self._keys, self.filters, Counter())[0]


def _recorded_tokenizer(prefix: str, made: Manifest | None) -> str:
    """Where the tokenizer that made a dataset lies.

    Raises:
        UserError: nothing says where, or it is no longer there.
    """
    if made is None or not made.tokenizer_model:
        raise UserError(f"{prefix}: nothing says where the tokenizer that made it lies; give --tokenizer-model")
    if not Path(made.tokenizer_model).exists():
        raise UserError(
            f"{prefix}: its tokenizer is no longer at {made.tokenizer_model}; say where it is with --tokenizer-model"
        )
    return made.tokenizer_model


class TokenDataset:
    """Documents of a token dataset, decoded with its own tokenizer.

    Args:
        tokenizer_model: None for where the dataset's manifest says that it was.
        tokenizer_type: needed of a dataset without a manifest, which another tool wrote: what made it is the user's
            word then.

    Raises:
        UserError: nothing says of which type the tokenizer is, or the tokenizer is not the one that made the dataset.
    """

    filters: None = None

    def __init__(self, prefix: str, tokenizer_model: str | None = None, tokenizer_type: str | None = None) -> None:
        dataset, made = IndexedDataset(prefix), read_manifest(prefix)
        tokenizer_model = tokenizer_model or _recorded_tokenizer(prefix, made)
        kind = tokenizer_type if made is None else made.tokenizer.type
        if kind is None:
            raise UserError(
                f"{prefix}.json: without a manifest nothing says of which kind its tokenizer is; say it with "
                f"--tokenizer-type {' or '.join(TOKENIZER_TYPES)}"
            )
        if tokenizer_type not in (None, kind):
            raise UserError(f"--tokenizer-type {tokenizer_type}: {prefix} was made with a {kind}; drop it")
        tokenizer = load_tokenizer(kind, tokenizer_model)
        if made is not None and tokenizer.sha256 != made.tokenizer.sha256:
            raise UserError(
                f"{tokenizer_model}: not the tokenizer of {prefix} (sha256 {tokenizer.sha256[:12]}, "
                f"its manifest says {made.tokenizer.sha256[:12]}); give --tokenizer-model the one it was made with"
            )
        self._dataset, self._model = dataset, tokenizer_model
        given = TokenizerInfo(kind, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod_id)
        self._tokenizer = given if made is None else made.tokenizer
        framing = {*tokenizer.encode("", add_special_tokens=True).tolist(), tokenizer.eod_id}
        self._frame = frozenset(token for token in framing if token is not None)
        self.size = len(self._dataset)
        self.files = [*dataset_files(prefix), Path(tokenizer_model)]

    def identity(self) -> dict[str, Any]:
        return {"dataset": self._dataset.digest(), "tokenizer": self._tokenizer.sha256}

    def tasks(self, spec: ScorerSpec, done: int) -> Iterator[tuple[RangeTask | None, int]]:
        if isinstance(spec, ColumnSpec):
            raise UserError("--scorer column needs the rows of text files; give --input instead of --data")
        for number, (start, stop) in enumerate(self._ranges()):
            yield (None if number < done else self._task(start, stop, spec)), stop - start

    def _task(self, start: int, stop: int, spec: Any) -> RangeTask:
        prefix = str(self._dataset.prefix)
        return RangeTask(prefix, start, stop, self._tokenizer.type, self._model, self._frame, spec)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        ends = np.cumsum(self._dataset.lengths)
        start = 0
        while start < len(ends):
            before = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + TOKENS_AT_ONCE, side="right")))
            yield start, stop
            start = stop

    def described(self) -> dict[str, Any]:
        dataset = {
            "digest": self._dataset.digest(),
            "documents": len(self._dataset),
            "tokens": self._dataset.tokens,
            "tokenizer": asdict(self._tokenizer),
        }
        return {"inputs": None, "json_keys": None, "filters": None, "dataset": dataset}

    def sample(self, most_bytes: int) -> Iterator[str | LongString]:
        """The texts of every n-th range, so many that there are about `most_bytes` of them."""
        step = max(1, -(-BYTES_PER_TOKEN * self._dataset.tokens // most_bytes))
        for number, (start, stop) in enumerate(self._ranges()):
            if number % step == 0:
                yield from decoded(self._task(start, stop, None))
