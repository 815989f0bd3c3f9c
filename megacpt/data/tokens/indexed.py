"""Megatron's indexed token dataset: `PREFIX.bin` (raw little-endian tokens) and `PREFIX.idx` (lengths and offsets).

`.idx` is: 9 bytes magic, uint64 version (1), uint8 dtype code, uint64 sequences S, uint64 document indices D + 1,
int32 lengths [S] in tokens, int64 pointers [S] in bytes, int64 document indices [D + 1] in sequences.
The reader checks every bound before any token is read.
"""

import hashlib
import os
import struct
import weakref
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
BLOCK = 1 << 17
"""Entries of an index that are looked at together: memory does not grow with the corpus, and caches hold them."""
MOST_TOKENS = (1 << 31) - 1
"""Documents of a dataset with at most so many tokens have lengths that fit into int32."""
SMALL_VOCABULARY = 65_500
"""Vocabularies below this are stored as uint16, others as int32 (Megatron's rule)."""


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
    for start in range(0, len(values), BLOCK):
        yield np.asarray(values[start : start + BLOCK])


def write_dataset(prefix: str | Path, dtype: np.dtype, documents: Iterable[np.ndarray]) -> None:
    """Write a whole small dataset, one sequence per document (tests)."""
    lengths: list[int] = []
    with atomic_write(bin_path(prefix)) as handle:
        for document in documents:
            handle.write(np.ascontiguousarray(document, dtype=dtype.newbyteorder("<")).tobytes())
            lengths.append(len(document))
    write_index(prefix, dtype, np.asarray(lengths, dtype=np.int32))


class IndexedDataset:
    """A bounds-checked reader of one `PREFIX.{bin,idx}` pair.

    Attributes:
        lengths: int32 [documents] (a view of the index; int64 where documents have several sequences), tokens of each
            document, EOD included.
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
        self._bin = _File(bin_path(prefix))
        self._index = index = _File(idx_path(prefix))
        self.dtype, sequences, boundaries = self._read_header(index)
        self._pointers_at = HEADER.size + 4 * sequences
        self._boundaries_at = self._pointers_at + 8 * sequences
        # Still mapped, but as a plain array, which answers for an element sooner.
        raw = np.asarray(np.memmap(index.path, mode="r"))
        self.sequences: np.ndarray = raw[HEADER.size : self._pointers_at].view("<i4")
        self.boundaries: np.ndarray = raw[self._boundaries_at :].view("<i8")
        self.tokens = self._check_bounds(index, sequences)
        self._one_each = self._check_boundaries(index, sequences, boundaries)
        self.lengths = self.sequences if self._one_each else self._fold()
        self._digest: str | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def _read_header(self, index: "_File") -> tuple[np.dtype, int, int]:
        """Dtype of the tokens, number of sequences and of document boundaries."""
        path, size = index.path, index.size
        header = index.read(np.dtype("u1"), HEADER.size, 0).tobytes()
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
        return np.dtype(DTYPES[code]).newbyteorder("<"), sequences, boundaries

    def _check_bounds(self, index: "_File", sequences: int) -> int:
        """Refuse a sequence that does not lie inside the tokens; the sum of all lengths."""
        size, item, tokens = self._bin.size, self.dtype.itemsize, 0
        for start in range(0, sequences, BLOCK):
            count = min(BLOCK, sequences - start)
            lengths = index.read(np.dtype("<i4"), count, HEADER.size + 4 * start)
            pointers = index.read(np.dtype("<i8"), count, HEADER.size + 4 * sequences + 8 * start)
            total = int(lengths.sum(dtype=np.int64))
            tokens += total
            if self._follow(lengths, pointers) and int(pointers[0]) + total * item <= size:
                continue
            lengths = lengths.astype(np.int64)
            ends = lengths * item + pointers
            # A pointer near the largest int64 wraps round in `ends`: it is compared by itself.
            within = min(lengths.min(), pointers.min(), ends.min()) >= 0 and max(pointers.max(), ends.max()) <= size
            if not within or np.bitwise_or.reduce(pointers) % item:
                bad = (lengths < 0) | (pointers < 0) | (pointers > size) | (pointers % item != 0) | (ends > size)
                at = int(bad.argmax())
                raise UserError(
                    f"{self._bin.path}: truncated or foreign: document {start + at:,} of {sequences:,} ends "
                    f"at byte {int(ends[at]):,}, the file has {size:,}; preprocess the corpus again"
                )
        return tokens

    def _follow(self, lengths: np.ndarray, pointers: np.ndarray) -> bool:
        """Whether sequences begin at a token and follow one another without a gap, as writers lay them; soon told."""
        if lengths.min() < 0 or pointers[0] < 0 or pointers[0] % self.dtype.itemsize:
            return False
        ends = np.cumsum(lengths[:-1], dtype=np.int64)
        ends *= self.dtype.itemsize
        ends += pointers[0]
        return bool((ends == pointers[1:]).all())

    def _check_boundaries(self, index: "_File", sequences: int, boundaries: int) -> bool:
        """Refuse document boundaries that do not cover the sequences; whether each document is one sequence."""
        offset, one_each, last = HEADER.size + 12 * sequences, boundaries == sequences + 1, 0
        covered = boundaries > 0 and index.read(np.dtype("<i8"), 1, offset)[0] == 0
        for start in range(0, boundaries if covered else 0, BLOCK):
            part = index.read(np.dtype("<i8"), min(BLOCK + 1, boundaries - start), offset + 8 * start)
            steps, last = part[1:] - part[:-1], int(part[-1])
            least = steps.min() if len(steps) else 1
            covered = covered and least >= 0
            one_each = one_each and least == 1 and last - int(part[0]) == len(steps)
        if not covered or last != sequences:
            raise UserError(
                f"{index.path}: its document boundaries do not cover its sequences; preprocess the corpus again"
            )
        return bool(one_each)

    def _fold(self) -> np.ndarray:
        """Lengths of documents that have any number of sequences: int32 [documents], int64 where one is very long."""
        ends, tokens = 0, 0
        for lengths, pointers in self._sequence_parts():
            inner = pointers[1:] == pointers[:-1] + lengths[:-1].astype(np.int64) * self.dtype.itemsize
            if not inner.all() or (tokens and pointers[0] != ends):
                raise UserError(
                    f"{idx_path(self.prefix)}: documents of several sequences must lie back to back; preprocess the "
                    "corpus again"
                )
            ends, tokens = int(pointers[-1]) + int(lengths[-1]) * self.dtype.itemsize, tokens + len(lengths)
        folded = np.zeros(len(self.boundaries) - 1, dtype=np.int64 if self.tokens > MOST_TOKENS else np.int32)
        for start in range(0, len(folded), BLOCK):
            cuts = np.asarray(self.boundaries[start : start + BLOCK + 1])
            total = np.zeros(int(cuts[-1] - cuts[0]) + 1, dtype=np.int64)
            np.cumsum(self.sequences[cuts[0] : cuts[-1]], out=total[1:])
            folded[start : start + BLOCK] = np.diff(total[cuts - cuts[0]])
        return folded

    def _sequence_parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Lengths and pointers of all sequences, some at a time."""
        for start in range(0, len(self.sequences), BLOCK):
            lengths = self.sequences[start : start + BLOCK]
            yield lengths, self._index.read(np.dtype("<i8"), len(lengths), self._pointers_at + 8 * start)

    def _start(self, document: int) -> int:
        """The byte at which a document begins."""
        sequence = document
        if not self._one_each:
            sequence = int(self._index.read(np.dtype("<i8"), 1, self._boundaries_at + 8 * document)[0])
            if sequence == len(self.sequences):
                return self._bin.size
        return int(self._index.read(np.dtype("<i8"), 1, self._pointers_at + 8 * sequence)[0])

    def is_back_to_back(self) -> bool:
        """Whether sequences follow one another in the `.bin` from its start, with nothing between them."""
        start = 0
        for lengths, pointers in self._sequence_parts():
            ends = start + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            # Where an empty sequence lies means nothing.
            if ((ends - lengths.astype(np.int64) * self.dtype.itemsize != pointers) & (lengths > 0)).any():
                return False
            start = int(ends[-1])
        return True

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of one document, read from the file.

        Raises:
            IndexError: the document, or the range inside it, does not exist.
        """
        length = int(self.lengths[document])
        stop = length if stop is None else stop
        if document < 0 or not 0 <= start <= stop <= length:
            raise IndexError(f"{self.prefix}: document {document}, tokens {start}:{stop}, length {length}")
        return self._bin.read(self.dtype, stop - start, self._start(document) + start * self.dtype.itemsize)

    def digest(self) -> str:
        """SHA-256 that tells this content from another: dtype, sizes, and evenly spaced blocks of lengths and tokens.

        Up to half a million documents that is every length. It does not grow with the corpus: a change between the
        blocks that keeps the number of documents and of tokens goes unseen.
        """
        if self._digest is not None:
            return self._digest
        digest = hashlib.sha256(f"{self.dtype.str} {len(self.lengths)} {self.tokens}".encode())
        for start, count in _spaced(len(self.lengths)):
            digest.update(np.ascontiguousarray(self.lengths[start : start + count], dtype="<i8").data)
        item = self.dtype.itemsize
        for start, count in _spaced(self._bin.size // item):
            digest.update(self._bin.read(self.dtype, count, start * item).data)
        self._digest = digest.hexdigest()
        return self._digest

    def check_vocabulary(self, vocab_size: int) -> None:
        """Scan every token and refuse one outside [0, vocab_size).

        Raises:
            UserError: names the file, the document and the token.
        """
        item = self.dtype.itemsize
        for start in range(0, self._bin.size // item, BLOCK):
            part = self._bin.read(self.dtype, min(BLOCK, self._bin.size // item - start), start * item)
            if int(part.max()) < vocab_size and int(part.min()) >= 0:
                continue
            at = int(((part >= vocab_size) | (part < 0)).argmax())
            byte = (start + at) * item
            raise out_of_vocabulary(self.prefix, self._document_at(byte), int(part[at]), vocab_size)

    def _document_at(self, byte: int) -> int:
        """The document that holds a byte of the `.bin`."""
        done = 0
        for lengths, pointers in self._sequence_parts():
            inside = (pointers <= byte) & (byte < pointers + lengths.astype(np.int64) * self.dtype.itemsize)
            if inside.any():
                return int(self.boundaries.searchsorted(done + int(inside.argmax()), side="right")) - 1
            done += len(lengths)
        return 0


class _File:
    """A file read at offsets, from any number of threads.

    Not a memory map: a map keeps every page it has touched, and fetches a neighbourhood around each document that a
    shuffled pass will not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, dtype: np.dtype, count: int, offset: int) -> np.ndarray:
        """`count` values from byte `offset` on, less where the file ends: [count], read-only."""
        content = os.pread(self._descriptor, count * dtype.itemsize, offset)
        return np.frombuffer(content, dtype, len(content) // dtype.itemsize)


def _spaced(size: int, blocks: int = 128, block: int = 4096) -> list[tuple[int, int]]:
    """Up to `blocks` evenly spaced blocks of range(size), as (start, length)."""
    step = max(1, -(-size // blocks))
    return [(start, min(step, block, size - start)) for start in range(0, size, step)]


def out_of_vocabulary(prefix: str, document: int, token: int, vocab_size: int) -> UserError:
    """The error for a token that the model's vocabulary does not have."""
    return UserError(
        f"{bin_path(prefix)}: document {document:,} holds token {token}, but the vocabulary has {vocab_size:,}; "
        "preprocess the corpus with this model's tokenizer"
    )
