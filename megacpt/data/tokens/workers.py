"""Blocks to tokens in their order: in this process or in others of this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from megacpt.data.text import documents
from megacpt.data.text.documents import Block
from megacpt.data.tokens.encode import EncodedBlock, Encoding, encode_block
from megacpt.data.tokens.fast_tokenizer import FastTokenizer, chosen_engine, open_tokenizer
from megacpt.data.tokens.pool import Run, pool
from megacpt.data.tokens.tokenizer import Tokenizer

Encode = Run[Block, EncodedBlock]
"""Encodes blocks, in order, as they are asked for."""


def encode_here(encoding: Encoding, tokenizer: Tokenizer) -> Encode:
    """In this process."""
    return lambda blocks: (encode_block(block, encoding, tokenizer) for block in blocks)


@contextmanager
def encode_in_processes(encoding: Encoding, tokenizer: Tokenizer, workers: int) -> Iterator[Encode]:
    """In `workers` processes, all with the engine that was found here."""
    with pool(Encoder(encoding, tokenizer), workers, ahead=_weight) as encode:
        yield encode


def _weight(block: Block) -> float:
    """A block is of about BLOCK_BYTES unless a single row is larger."""
    return max(1.0, block.size / (2 * documents.BLOCK_BYTES))


class Encoder:
    """Encodes blocks; where it is pickled, the tokenizer is opened anew on the other side."""

    def __init__(self, encoding: Encoding, tokenizer: Tokenizer) -> None:
        self._encoding = replace(encoding, engine=chosen_engine(tokenizer))
        self._tokenizer = tokenizer.settled() if isinstance(tokenizer, FastTokenizer) else tokenizer

    def __call__(self, block: Block) -> EncodedBlock:
        return encode_block(block, self._encoding, self._tokenizer)

    def __reduce__(self) -> tuple[Any, ...]:
        return _encoder, (self._encoding,)


def _encoder(encoding: Encoding) -> Encoder:
    return Encoder(encoding, open_tokenizer(encoding.tokenizer_type, encoding.tokenizer_model, encoding.engine))
