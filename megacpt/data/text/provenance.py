"""Which files were read and which of their rows were kept: for every manifest that follows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class InputFile:
    """One input file: its name without folders, size, and sha256 of its bytes as they lie on disk.

    sha256 is empty in a shard that does not reach the file's end; a later shard has it.
    """

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Filters:
    """Which rows become documents; equal filters on equal inputs give the same documents in the same order.

    The first key's text is the document's: filters look at it, and a row is kept or dropped with all its keys.

    Attributes:
        skip_invalid: pass over bad rows, instead of stopping at the first.
        min_chars: the fewest characters (code points) that a text may have.
        dedup: "exact" keeps the first of equal texts; "none".
    """

    skip_invalid: bool = False
    min_chars: int = 0
    dedup: str = "none"
