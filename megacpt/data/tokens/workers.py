"""Blocks to tokens in their order: in this process, in others of this machine, or wherever else they are encoded.

Whoever has encoded a block also writes its tokens, where it is told to: they do not pass through the process that sees
to the order, which therefore keeps many workers busy.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from megacpt.data.text import documents
from megacpt.data.text.documents import Block
from megacpt.data.tokens.encode import EncodedBlock, Encoding, encode_block
from megacpt.data.tokens.fast_tokenizer import FastTokenizer, chosen_engine, open_tokenizer
from megacpt.data.tokens.placing import HeldTokens, Places
from megacpt.data.tokens.processes import Processes
from megacpt.data.tokens.tokenizer import Tokenizer


class Encode(Protocol):
    """Encodes the blocks of one run."""

    def run(self, blocks: Iterable[Block]) -> Generator[EncodedBlock, None, None]:
        """Encoded blocks in order, as they are asked for; their tokens are kept for `write`."""
        ...

    def write(self, places: Places) -> None:
        """Write the tokens of the latest block, some time before `settle`; has to be called for each."""
        ...

    def settle(self) -> None:
        """Wait until all is written that should be.

        Raises:
            DiskError: something could not be written, now or before.
        """
        ...


@contextmanager
def encode_with(encode: Callable[[Iterable[Block]], Iterator[EncodedBlock]]) -> Iterator[Encode]:
    """By a function whose tokens come to this process."""
    with closing(HeldTokens()) as tokens:
        yield _Here(encode, tokens)


def encode_here(encoding: Encoding, tokenizer: Tokenizer) -> AbstractContextManager[Encode]:
    """In this process."""
    # `map`, unlike a loop, has let go of a block before it asks for the next.
    return encode_with(partial(map, partial(encode_block, encoding=encoding, tokenizer=tokenizer)))


@contextmanager
def encode_in_processes(encoding: Encoding, tokenizer: Tokenizer, workers: int) -> Iterator[Encode]:
    """In `workers` processes, all with the engine that was found here."""
    processes = _InProcesses(Encoder(encoding, tokenizer), workers, _weight)
    try:
        yield processes
    finally:
        processes.end()


class _Here:
    def __init__(self, encode: Callable[[Iterable[Block]], Iterator[EncodedBlock]], tokens: HeldTokens) -> None:
        self._encode, self._tokens = encode, tokens

    def run(self, blocks: Iterable[Block]) -> Generator[EncodedBlock, None, None]:
        for encoded in self._encode(blocks):
            held = self._tokens.hold(encoded)
            # The tokens go when they are written, before the next block is encoded.
            del encoded
            yield held

    def write(self, places: Places) -> None:
        self._tokens.write(places)

    def settle(self) -> None:
        """All is written already."""


class _InProcesses(Processes):
    def write(self, places: Places) -> None:
        self.tell(places)


def _weight(block: Block) -> float:
    """A block is of about BLOCK_BYTES unless a single row is larger."""
    return max(1.0, block.size / (2 * documents.BLOCK_BYTES))


class Encoder:
    """Encodes blocks and writes their tokens; where it is pickled, the tokenizer is opened anew on the other side."""

    def __init__(self, encoding: Encoding, tokenizer: Tokenizer) -> None:
        self._encoding = replace(encoding, engine=chosen_engine(tokenizer))
        self._tokenizer = tokenizer.settled() if isinstance(tokenizer, FastTokenizer) else tokenizer
        self._tokens = HeldTokens()

    def __call__(self, what: Block | Places) -> EncodedBlock | None:
        if isinstance(what, Places):
            self._tokens.write(what)
            return None
        return self._tokens.hold(encode_block(what, self._encoding, self._tokenizer))

    def __reduce__(self) -> tuple[Any, ...]:
        return _encoder, (self._encoding,)


def _encoder(encoding: Encoding) -> Encoder:
    return Encoder(encoding, open_tokenizer(encoding.tokenizer_type, encoding.tokenizer_model, encoding.engine))
