"""Megatron's indexed token dataset: `PREFIX.bin` (raw little-endian tokens) and `PREFIX.idx` (lengths and offsets).

`.idx` is: 9 bytes magic, uint64 version (1), uint8 dtype code, uint64 sequences S, uint64 document indices D + 1,
int32 lengths [S] in tokens, int64 pointers [S] in bytes, int64 document indices [D + 1] in sequences.
The reader checks every bound before anything is read through the memory map.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from megacpt.errors import UserError
from megacpt.files import atomic_write

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
SMALL_VOCABULARY = 65_500
"""Vocabularies below this are stored as uint16, others as int32 (Megatron's rule)."""
AT_ONCE = 1 << 20
"""Sequences whose index entries are made at a time."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which Megatron stores tokens of a vocabulary of `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size < SMALL_VOCABULARY else np.int32)


def bin_path(prefix: str | Path) -> Path:
    """`PREFIX.bin`; a prefix may itself contain dots."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """`PREFIX.idx`; a prefix may itself contain dots."""
    return Path(f"{prefix}.idx")


def write_index(prefix: str | Path, dtype: np.dtype, lengths: np.ndarray, documents: np.ndarray | None = None) -> None:
    """Write `PREFIX.idx` atomically for sequences stored back to back in `PREFIX.bin`.

    Args:
        lengths: int32 [S], tokens per sequence; may be a memory map.
        documents: int64 [D + 1], sequence at which each document starts, then S; by default one sequence a document.
    """
    if documents is None:
        documents = np.arange(len(lengths) + 1)
    with atomic_write(idx_path(prefix)) as handle:
        write_header(handle, dtype, len(lengths), len(documents))
        for part in parts(lengths):
            handle.write(part.astype("<i4").tobytes())
        write_pointers(handle, dtype, parts(lengths))
        for part in parts(documents):
            handle.write(part.astype("<i8").tobytes())


def write_document_index(prefix: str | Path, dtype: np.dtype, lengths: np.ndarray) -> None:
    """Write `PREFIX.idx` atomically for documents of `lengths` [D] tokens: one sequence each, none where that is 0.

    A memory map will do: nothing of its size is made in memory.
    """
    sequences = sum(int(np.count_nonzero(part)) for part in parts(lengths))
    with atomic_write(idx_path(prefix)) as handle:
        write_header(handle, dtype, sequences, len(lengths) + 1)
        for part in parts(lengths):
            handle.write(part[part > 0].astype("<i4").tobytes())
        write_pointers(handle, dtype, (part[part > 0] for part in parts(lengths)))
        handle.write(np.zeros(1, dtype="<i8").tobytes())
        done = 0
        for part in parts(lengths):
            ends = done + np.cumsum(part > 0, dtype="<i8")
            handle.write(ends.tobytes())
            done = int(ends[-1])


def write_header(handle: IO[bytes], dtype: np.dtype, sequences: int, boundaries: int) -> None:
    """The start of an `.idx`: so many sequences, so many document indices (documents + 1)."""
    handle.write(HEADER.pack(MAGIC, VERSION, CODES[np.dtype(dtype)], sequences, boundaries))


def write_pointers(handle: IO[bytes], dtype: np.dtype, lengths: Iterable[np.ndarray]) -> None:
    """Byte at which each sequence of `lengths` (in tokens, array by array) begins, as int64."""
    start = 0
    for part in lengths:
        ends = start + np.cumsum(part, dtype="<i8") * dtype.itemsize
        handle.write(np.concatenate([[start], ends[:-1]]).astype("<i8").tobytes() if len(part) else b"")
        start = int(ends[-1]) if len(part) else start


def parts(values: np.ndarray) -> Iterator[np.ndarray]:
    """An array piece by piece."""
    for start in range(0, len(values), AT_ONCE):
        yield np.asarray(values[start : start + AT_ONCE])


def write_dataset(prefix: str | Path, dtype: np.dtype, documents: Iterable[np.ndarray]) -> None:
    """Write a whole small dataset, one sequence per document (tests, materialised subsets)."""
    lengths: list[int] = []
    with atomic_write(bin_path(prefix)) as handle:
        for document in documents:
            handle.write(np.ascontiguousarray(document, dtype=dtype.newbyteorder("<")).tobytes())
            lengths.append(len(document))
    write_index(prefix, dtype, np.asarray(lengths, dtype=np.int32))


class IndexedDataset:
    """A memory-mapped, bounds-checked reader of one `PREFIX.{bin,idx}` pair.

    Attributes:
        lengths: int64 [documents], tokens of each document, EOD included.
        tokens: total tokens.
        sequences, boundaries: int32 [sequences] tokens and int64 [documents + 1] sequences, maps of the index.

    Raises:
        UserError: a file is missing, truncated, of another format, or its index points outside the tokens.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        for path in (idx_path(prefix), bin_path(prefix)):
            if not path.is_file():
                hint = " (give the prefix without the suffix)" if str(prefix).endswith((".bin", ".idx")) else ""
                raise UserError(
                    f"{path}: no such file; a dataset is a PREFIX with both PREFIX.bin and PREFIX.idx{hint}"
                )
        self.dtype, self.sequences, self._pointers, self.boundaries = self._read_index()
        self.lengths = self._document_lengths(self.sequences, self.boundaries)
        self.tokens = int(self.lengths.sum())
        size = bin_path(prefix).stat().st_size
        self._bin = np.memmap(bin_path(prefix), dtype=self.dtype, mode="r") if size else np.empty(0, self.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def _read_index(self) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
        path = idx_path(self.prefix)
        size = path.stat().st_size
        with open(path, "rb") as handle:
            header = handle.read(HEADER.size)
        if len(header) < HEADER.size or header[:9] != MAGIC:
            raise UserError(
                f"{path}: not a Megatron index (it does not start with MMIDIDX); preprocess the corpus again"
            )
        _, version, code, sequences, boundaries = HEADER.unpack(header)
        if version != VERSION or code not in DTYPES:
            raise UserError(
                f"{path}: index version {version}, dtype code {code} are unknown; preprocess the corpus again"
            )
        if np.dtype(DTYPES[code]).kind not in "iu":
            raise UserError(f"{path}: holds {np.dtype(DTYPES[code])} values, which cannot be tokens")
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if size != expected:
            state = "truncated" if size < expected else "longer than it says"
            raise UserError(f"{path}: {state} ({size:,} bytes, its header promises {expected:,}); preprocess again")
        raw = np.memmap(path, mode="r")
        cut = [HEADER.size, HEADER.size + 4 * sequences, HEADER.size + 12 * sequences, expected]
        lengths, pointers, documents = (
            raw[a:b].view(t) for a, b, t in zip(cut, cut[1:], ("<i4", "<i8", "<i8"), strict=False)
        )
        return np.dtype(DTYPES[code]).newbyteorder("<"), lengths, pointers, documents

    def _document_lengths(self, lengths: np.ndarray, boundaries: np.ndarray) -> np.ndarray:
        """Check the index against the size of the tokens and fold sequences into documents."""
        path, size = idx_path(self.prefix), bin_path(self.prefix).stat().st_size
        pointers = self._pointers
        ends = pointers + lengths.astype(np.int64) * self.dtype.itemsize
        # A pointer near the largest int64 wraps round in `ends`: it is compared by itself.
        bad = (lengths < 0) | (pointers < 0) | (pointers > size) | (pointers % self.dtype.itemsize != 0) | (ends > size)
        if bad.any():
            first = int(bad.argmax())
            raise UserError(
                f"{bin_path(self.prefix)}: truncated or foreign: document {first:,} of {len(lengths):,} ends at byte "
                f"{int(ends[first]):,}, the file has {size:,}; preprocess the corpus again"
            )
        if (
            len(boundaries) == 0
            or boundaries[0] != 0
            or boundaries[-1] != len(lengths)
            or (np.diff(boundaries) < 0).any()
        ):
            raise UserError(f"{path}: its document boundaries do not cover its sequences; preprocess the corpus again")
        if len(boundaries) == len(lengths) + 1 and (np.diff(boundaries) == 1).all():
            return lengths.astype(np.int64)
        if (ends[:-1] != pointers[1:]).any():
            raise UserError(
                f"{path}: documents of several sequences must lie back to back; preprocess the corpus again"
            )
        total = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        starts = np.append(pointers, size)[boundaries[:-1]]
        self._pointers = starts
        return np.diff(total[boundaries])

    def is_back_to_back(self) -> bool:
        """Whether documents follow one another in the `.bin` from its start, with nothing between them."""
        start = 0
        for lengths, pointers in zip(parts(self.lengths), parts(self._pointers), strict=True):
            ends = start + np.cumsum(lengths) * self.dtype.itemsize
            # Where an empty document lies means nothing.
            if ((ends - lengths * self.dtype.itemsize != pointers) & (lengths > 0)).any():
                return False
            start = int(ends[-1])
        return True

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of one document, as a view of the file (no copy).

        Raises:
            IndexError: the document, or the range inside it, does not exist.
        """
        length = int(self.lengths[document])
        stop = length if stop is None else stop
        if document < 0 or not 0 <= start <= stop <= length:
            raise IndexError(f"{self.prefix}: document {document}, tokens {start}:{stop}, length {length}")
        first = int(self._pointers[document]) // self.dtype.itemsize
        return self._bin[first + start : first + stop]

    def digest(self, blocks: int = 256, block: int = 4096) -> str:
        """SHA-256 that tells this content from another: dtype, every length, and evenly spaced blocks of the tokens."""
        digest = hashlib.sha256(self.dtype.str.encode())
        digest.update(np.ascontiguousarray(self.lengths, dtype="<i8").data)
        step = max(1, len(self._bin) // blocks)
        for start in range(0, len(self._bin), step):
            digest.update(np.ascontiguousarray(self._bin[start : start + min(step, block)]).data)
        return digest.hexdigest()

    def check_vocabulary(self, vocab_size: int, block: int = 1 << 24) -> None:
        """Scan every token and refuse one outside [0, vocab_size).

        Raises:
            UserError: names the file, the document and the token.
        """
        for start in range(0, len(self._bin), block):
            part = self._bin[start : start + block]
            if not len(part) or (int(part.max()) < vocab_size and int(part.min()) >= 0):
                continue
            at = start + int(((part >= vocab_size) | (part < 0)).argmax())
            byte = at * self.dtype.itemsize
            inside = (self._pointers <= byte) & (byte < self._pointers + self.lengths * self.dtype.itemsize)
            raise out_of_vocabulary(self.prefix, int(inside.argmax()), int(self._bin[at]), vocab_size)


def out_of_vocabulary(prefix: str, document: int, token: int, vocab_size: int) -> UserError:
    """The error for a token that the model's vocabulary does not have."""
    return UserError(
        f"{bin_path(prefix)}: document {document:,} holds token {token}, but the vocabulary has {vocab_size:,}; "
        "preprocess the corpus with this model's tokenizer"
    )
