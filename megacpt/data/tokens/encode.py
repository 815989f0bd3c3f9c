"""One block of rows to tokens: the work of a preprocessing process."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from megacpt.data.text.documents import Block
from megacpt.data.text.filtering import digests_of, kept_columns
from megacpt.data.text.provenance import Filters
from megacpt.data.tokens.indexed import token_dtype
from megacpt.data.tokens.long_texts import encode_texts
from megacpt.data.tokens.packed import Packed
from megacpt.data.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoding:
    """How a row becomes tokens; what a worker process is told.

    Attributes:
        engine: one of `fast_tokenizer.ENGINES`.
    """

    keys: tuple[str, ...]
    tokenizer_type: str
    tokenizer_model: str
    append_eod: bool
    skip_invalid: bool
    engine: str = "auto"
    min_chars: int = 0
    dedup: str = "none"

    @property
    def filters(self) -> Filters:
        """Which rows become documents."""
        return Filters(self.skip_invalid, self.min_chars, self.dedup)


@dataclass(frozen=True)
class EncodedBlock:
    """Tokens of a block: per key, those of all documents and their lengths, int32 [documents]; and what it took.

    Attributes:
        tokens: empty once they are held elsewhere.
        text_bytes: per key, UTF-8 bytes of each document's text, int64 [documents].
        skipped: rows dropped, by kind.
        digests: of the documents, uint64 [documents, 2]; None unless duplicates are to be dropped.
    """

    tokens: list[Packed]
    lengths: list[np.ndarray]
    text_bytes: list[np.ndarray]
    skipped: Counter[str]
    consumed: int
    text: int
    digests: np.ndarray | None = None

    def without(self, keep: np.ndarray, kind: str) -> "EncodedBlock":
        """Of a block whose tokens are elsewhere, the documents of `keep`, bool [documents]; others count as `kind`."""
        assert not self.tokens
        if keep.all():
            return self
        lengths, text_bytes = ([part[keep] for part in parts] for parts in (self.lengths, self.text_bytes))
        digests = None if self.digests is None else self.digests[keep]
        skipped = self.skipped + Counter({kind: int((~keep).sum())})
        return replace(self, lengths=lengths, text_bytes=text_bytes, skipped=skipped, digests=digests)


def encode_block(block: Block, encoding: Encoding, tokenizer: Tokenizer) -> EncodedBlock:
    """Load, parse and encode one block.

    Raises:
        UserError: a bad row, unless they are to be skipped.
    """
    dtype = token_dtype(tokenizer.vocab_size).newbyteorder("<")
    skipped: Counter[str] = Counter()
    # Of the rows, the texts alone are kept: there may be a very long one.
    columns = kept_columns(block.loaded(), encoding.keys, encoding.filters, skipped)
    digests = None if encoding.dedup == "none" else digests_of(columns[0])
    eod = tokenizer.eod_id if encoding.append_eod else None
    assert eod is not None or not encoding.append_eod, "the tokenizer of a job that appends EOD has one"
    encoded = [encode_texts(tokenizer, texts, dtype, eod) for texts in columns]
    tokens, lengths, text_bytes = map(list, zip(*encoded, strict=True))
    return EncodedBlock(tokens, lengths, text_bytes, skipped, block.consumed, block.size, digests)
