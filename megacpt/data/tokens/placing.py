"""Tokens of encoded blocks, written to their places by whichever process has them, at any place of a file and so in
any order."""

import os
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megacpt.data.tokens.encode import EncodedBlock
from megacpt.files import disk_errors


@dataclass(frozen=True)
class Places:
    """Where the tokens of one block go.

    Attributes:
        files: one a key; they exist.
        offsets: bytes, one a key.
        keep: which of its documents, bool [documents]; None for all.
    """

    files: tuple[Path, ...]
    offsets: tuple[int, ...]
    keep: np.ndarray | None = None


class HeldTokens:
    """Tokens of blocks that have no places yet, the oldest first."""

    def __init__(self) -> None:
        self._blocks: deque[EncodedBlock] = deque()
        self._files: dict[Path, int] = {}

    def hold(self, encoded: EncodedBlock) -> EncodedBlock:
        """Keep a block's tokens; the rest of it."""
        self._blocks.append(encoded)
        return replace(encoded, tokens=[])

    def write(self, places: Places) -> None:
        """Write the tokens of the oldest block.

        Raises:
            DiskError: there is no room, or no permission.
        """
        encoded = self._blocks.popleft()
        for key, (path, offset) in enumerate(zip(places.files, places.offsets, strict=True)):
            keep = None if places.keep is None else np.repeat(places.keep, encoded.lengths[key])
            for tokens in encoded.tokens[key].arrays(keep):
                with disk_errors(path):
                    _write_at(self._file(path), tokens, offset)
                offset += tokens.nbytes

    def _file(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_WRONLY)
        return self._files[path]

    def close(self) -> None:
        """Close the files; what is held is dropped."""
        self._blocks.clear()
        while self._files:
            os.close(self._files.popitem()[1])


def _write_at(descriptor: int, tokens: np.ndarray, offset: int) -> None:
    data = memoryview(tokens).cast("B") if tokens.size else memoryview(b"")
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
