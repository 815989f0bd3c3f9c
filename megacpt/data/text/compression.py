"""Bytes of a plain, gzip or zstd file, chunk by chunk, with truncation always noticed."""

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

CHUNK_BYTES = 1 << 17


class Damaged(Exception):
    """A compressed file ends early or is not what its suffix says."""


class HashingFile:
    """Reads a binary file forwards from `start` to `stop`; knows how far it is and the sha256 of what has passed."""

    def __init__(self, handle: IO[bytes], start: int = 0, stop: int | None = None) -> None:
        self._handle, self._stop = handle, stop
        self._sha256 = hashlib.sha256()
        self.position = handle.seek(start)

    def read(self, size: int = -1) -> bytes:
        if self._stop is not None:
            left = self._stop - self.position
            size = left if size < 0 else min(size, left)
        chunk = self._handle.read(size)
        self._sha256.update(chunk)
        self.position += len(chunk)
        return chunk

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def chunks_of(path: Path, raw: HashingFile) -> Iterator[bytes]:
    """Decompressed chunks of `raw`; the suffix of `path` says how it is packed.

    Raises:
        Damaged: truncated, corrupt, or not of the suffix's format.
    """
    if path.suffix == ".gz":
        return _gzip_chunks(raw)
    if path.suffix == ".zst":
        return _zstd_chunks(raw)
    return iter(lambda: raw.read(CHUNK_BYTES), b"")


def _gzip_chunks(raw: HashingFile) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=raw, mode="rb") as handle:  # type: ignore[call-overload]
            while chunk := handle.read1(CHUNK_BYTES):
                yield chunk
    except EOFError as error:
        raise Damaged("the gzip file is truncated") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise Damaged(f"the gzip file is damaged ({error})") from error
    if raw.position == 0:
        raise Damaged("the gzip file is truncated")


def _zstd_chunks(raw: HashingFile) -> Iterator[bytes]:
    # zstandard's own stream reader takes a truncated frame for the end of the file, so frames are followed here.
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = unpacker.decompressobj()
    inside = True
    try:
        while packed := raw.read(CHUNK_BYTES):
            while packed:
                if frame.eof:
                    frame = unpacker.decompressobj()
                if chunk := frame.decompress(packed):
                    yield chunk
                packed = frame.unused_data if frame.eof else b""
            inside = not frame.eof
    except zstandard.ZstdError as error:
        raise Damaged(f"the zstd file is damaged ({error})") from error
    if inside:
        raise Damaged("the zstd file is truncated")
