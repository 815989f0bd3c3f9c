"""The inputs of a run, encoded block by block into its work folder."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice

from megacpt.data.text.documents import Block, Source
from megacpt.data.text.filtering import DUPLICATES, DigestSet
from megacpt.data.text.rows import WrongRow
from megacpt.data.tokens.encode import Encoding
from megacpt.data.tokens.progress import Progress, Totals
from megacpt.data.tokens.work import Work
from megacpt.data.tokens.workers import Encode
from megacpt.errors import UserError

BLOCKS_AHEAD = 64
"""Blocks that are read on after a bad row of a packed file to see whether the file is damaged."""


@dataclass(frozen=True)
class Reporting:
    """What happens between two blocks: progress is shown, and `check` may end the run by raising."""

    log_interval: int | None
    check: Callable[[], None]


def stream(
    work: Work, sources: Sequence[Source], first_input: int, encoding: Encoding, encode: Encode, reporting: Reporting
) -> None:
    """Encode what is left of the inputs and write it as it comes.

    Args:
        first_input: number of the first of `sources` among all inputs of the job.

    Raises:
        UserError: a bad file or row; the disk is full.
    """
    seen = _seen_before(work) if encoding.dedup == "exact" else None
    # Blocks that were read and are not written yet; None stands after those of a file for its end.
    read: deque[tuple[Source, Block | None]] = deque()

    def blocks() -> Iterator[Block]:
        start = work.position.place
        for source in sources[work.position.inputs :]:
            for block in source.pieces(encoding.keys, start):
                read.append((source, block))
                yield block
                del block
            read.append((source, None))
            start = None

    def next_block() -> tuple[Source, Block] | None:
        while read:
            source, block = read.popleft()
            if block is not None:
                return source, block
            work.end_input(first_input + work.position.inputs, source)
        return None

    reading = blocks()
    progress = Progress(sum(source.part_size for source in sources), reporting.log_interval, _totals(work))
    with closing(progress), closing(encode.run(reading)) as encoded, _name_what_is_wrong(reading, read):
        for result in encoded:
            found = next_block()
            assert found is not None
            source, block = found
            keep = None if seen is None or result.digests is None else seen.add(result.digests)
            encode.write(work.places(keep))
            work.append(block, result if keep is None else result.without(keep, DUPLICATES))
            progress.update(_totals(work))
            work.note(source, due=True)
            reporting.check()
            # A block may be one very long document, to be let go of before the next is read.
            del result, found, block
    next_block()


@contextmanager
def _name_what_is_wrong(reading: Iterator[Block], read: deque[tuple[Source, Block | None]]) -> Iterator[None]:
    """Name a bad row by its line, and a damaged packed file rather than the garbage rows that come out of it before."""
    try:
        yield
    except UserError as error:
        source, wrong = next(((source, block) for source, block in read if block is not None), (None, None))
        if source is not None and source.packed:
            for _ in islice(reading, BLOCKS_AHEAD):
                if read[-1][0] is not source:
                    break
        if isinstance(error, WrongRow) and wrong is not None:
            raise error.named(wrong) from error
        raise


def _totals(work: Work) -> Totals:
    position = work.position
    return Totals(position.documents, sum(position.tokens), position.consumed, position.text)


def _seen_before(work: Work) -> DigestSet:
    seen = DigestSet()
    for digests in work.digests():
        seen.add(digests)
    return seen
