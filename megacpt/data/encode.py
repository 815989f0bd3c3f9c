"""One block of rows to tokens: the work of a preprocessing process."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from megacpt.data.documents import Block
from megacpt.data.filtering import digests_of, kept_rows
from megacpt.data.indexed import token_dtype
from megacpt.data.manifest import Filters
from megacpt.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoding:
    """How a row becomes tokens; what a worker process is told."""

    keys: tuple[str, ...]
    tokenizer_type: str
    tokenizer_model: str
    append_eod: bool
    skip_invalid: bool
    min_chars: int = 0
    dedup: str = "none"

    @property
    def filters(self) -> Filters:
        """Which rows become documents."""
        return Filters(self.skip_invalid, self.min_chars, self.dedup)


@dataclass(frozen=True)
class EncodedBlock:
    """Tokens of a block: per key, the bytes for `.bin` and int32 [documents] lengths; and what it took.

    Attributes:
        skipped: rows dropped, by kind.
        digests: of the documents, uint64 [documents, 2]; None unless duplicates are to be dropped.
    """

    tokens: list[bytes]
    lengths: list[np.ndarray]
    skipped: Counter[str]
    consumed: int
    text: int
    digests: np.ndarray | None = None


def encode_block(block: Block, encoding: Encoding, tokenizer: Tokenizer) -> EncodedBlock:
    """Parse and encode one block.

    Raises:
        UserError: a bad row, unless they are to be skipped.
    """
    dtype = token_dtype(tokenizer.vocab_size).newbyteorder("<")
    skipped: Counter[str] = Counter()
    rows = [texts for _, texts in kept_rows(block, encoding.keys, encoding.filters, skipped)]
    digests = None if encoding.dedup == "none" else digests_of([texts[0] for texts in rows])
    tokens, lengths = [], []
    for column in range(len(encoding.keys)):
        documents = tokenizer.encode_batch([texts[column] for texts in rows], add_special_tokens=True)
        if encoding.append_eod:
            eod = np.asarray([tokenizer.eod_id], dtype=np.int32)
            documents = [np.concatenate([ids, eod]) if len(ids) else ids for ids in documents]
        tokens.append(np.concatenate([np.empty(0, np.int32), *documents]).astype(dtype).tobytes())
        lengths.append(np.fromiter(map(len, documents), dtype=np.int32, count=len(documents)))
    return EncodedBlock(tokens, lengths, skipped, block.consumed, block.size, digests)
