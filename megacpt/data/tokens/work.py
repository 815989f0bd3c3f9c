"""The unfinished part of a run: datasets written so far, in a folder beside the output.

Documents come in the order of the inputs; every few seconds the files are synced and the journal notes how much there
is. Tokens are written by whoever has encoded them, each block at the place that it is given here.
After a kill the files are cut back to the last note, and the run goes on from there.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from megacpt.data.text.documents import Block, Source
from megacpt.data.text.filtering import DIGEST_BYTES
from megacpt.data.tokens.encode import EncodedBlock
from megacpt.data.tokens.journal import Journal, Position, note_of, read_journal
from megacpt.data.tokens.placing import Places
from megacpt.files import atomic_write, disk_errors, lock, make_folder

SECONDS_BETWEEN_NOTES = 10.0
WRITE_BACK = 1 << 26
"""Bytes of tokens after which the system is to begin with writing them to the disk, to leave little to syncing."""
LENGTH_BYTES, SIZE_BYTES = 4, 8
DIGESTS_AT_ONCE = 1 << 16
JOURNAL = "journal.jsonl"


class Work:
    """The folder of an unfinished run; this process alone writes there until `remove` or `leave`.

    Attributes:
        position: what is done: where to go on.
        records: the input files that are done.
        found, noted: documents that an earlier run left, and that the next one would find.
        stale: the folder holds the work of another job, or of inputs that have changed; `open` clears it.
        finishing: all is encoded, and some datasets may have their names already.
    """

    def __init__(
        self, folder: Path, job: dict[str, Any], sources: Sequence[Source], targets: Sequence[Path], skip_invalid: bool
    ) -> None:
        """Look into the folder, changing nothing in it.

        Args:
            job: what the work depends on apart from the inputs and `skip_invalid`; holds `itemsize` and `dedup`.
            targets: the final `.bin` of each key.

        Raises:
            UserError: another process works there, or nothing can be written there.
        """
        self.folder, self._targets, self._job = folder, targets, job
        make_folder(folder.parent)
        self._lock = lock(folder / ".lock", f"{folder}: the work folder of this output")
        journal = read_journal(folder / JOURNAL, job, len(targets), sources, skip_invalid)
        if journal.notes and not self._whole(journal):
            journal = Journal(job, Position([0] * len(targets)), stale=True)
        self._journal, self.position, self.records = journal, journal.position, journal.records
        self.stale, self.finishing, self.found = journal.stale, journal.finishing, journal.position.documents
        self.noted = self.found
        self._pending: list[dict[str, Any]] = []
        self._files: dict[str, IO[bytes]] = {}
        self._notes: IO[str] | None = None
        self._settle: Callable[[], None] = lambda: None
        self._begun: list[int] = []
        self._started = self._noted = time.monotonic()

    @property
    def worth(self) -> bool:
        """Whether what was noted is more than seconds of work."""
        lasted = time.monotonic() - self._started >= SECONDS_BETWEEN_NOTES
        return bool(self._journal.notes) and (lasted or self.found > 0)

    def _token_bytes(self, position: Position) -> list[int]:
        """How long the tokens of each key are at a position."""
        return [tokens * self._job["itemsize"] for tokens in position.tokens]

    def _bytes_of(self, position: Position) -> dict[str, int]:
        """How long each file is at a position."""
        sizes = {f"{key}.bin": size for key, size in enumerate(self._token_bytes(position))}
        for key in range(len(position.tokens)):
            sizes |= {f"{key}.lengths": position.documents * LENGTH_BYTES}
            sizes |= {f"{key}.text_bytes": position.documents * SIZE_BYTES}
        return sizes if self._job["dedup"] == "none" else {**sizes, "digests": position.documents * DIGEST_BYTES}

    def _whole(self, journal: Journal) -> bool:
        for name, size in self._bytes_of(journal.position).items():
            path = self.folder / name
            if journal.finishing and name.endswith(".bin") and not path.exists():
                path = self._targets[int(name.removesuffix(".bin"))]
            if not path.is_file() or path.stat().st_size < size:
                return False
        return True

    @property
    def untouched(self) -> bool:
        """Whether what the folder held, this job's or another's, is still as it was."""
        return not self._files

    def open(self, settle: Callable[[], None]) -> None:
        """Cut the files back to the position, and open them.

        Args:
            settle: returns once all tokens are at the places that were given; raises if any could not be written.
        """
        self._settle = settle
        self._begun = self._token_bytes(self.position)
        with disk_errors(self.folder):
            if self._journal.notes:
                self._write_journal()
            else:
                (self.folder / JOURNAL).unlink(missing_ok=True)
            for name, size in self._bytes_of(self.position).items():
                path = self.folder / name
                if self.finishing and not path.exists():
                    continue
                self._files[name] = handle = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
                handle.truncate(size)
                handle.seek(size)

    def _write_journal(self) -> None:
        with atomic_write(self.folder / JOURNAL, "w") as handle:
            for line in ({"job": self._job}, *self._journal.notes, *([{"finishing": True}] if self.finishing else [])):
                handle.write(json.dumps(line) + "\n")
        self._notes = open(self.folder / JOURNAL, "a", encoding="utf-8")  # noqa: SIM115

    def bin(self, key: int) -> Path:
        """The tokens of a key, as long as they do not have their final name."""
        return self.folder / f"{key}.bin"

    def digests(self) -> Iterator[np.ndarray]:
        """Digests of the documents written so far, uint64 [some, 2] at a time."""
        self._files["digests"].flush()
        with open(self.folder / "digests", "rb") as handle:
            while part := handle.read(DIGESTS_AT_ONCE * DIGEST_BYTES):
                yield np.frombuffer(part, dtype="<u8").reshape(-1, 2)

    def lengths(self, key: int) -> np.ndarray:
        """Tokens of each document of a key: int32 [documents], a map of the file."""
        return self._column(f"{key}.lengths", "<i4")

    def text_bytes(self, key: int) -> np.ndarray:
        """UTF-8 bytes of each document's text under a key: int64 [documents], a map of the file."""
        return self._column(f"{key}.text_bytes", "<i8")

    def _column(self, name: str, dtype: str) -> np.ndarray:
        if not self.position.documents:
            return np.empty(0, dtype)
        with disk_errors(self.folder):
            self._files[name].flush()
        return np.memmap(self.folder / name, dtype=dtype, mode="r")

    def places(self, keep: np.ndarray | None) -> Places:
        """Where the tokens of the next block go, of its documents `keep`, bool [documents], or all."""
        offsets = tuple(self._token_bytes(self.position))
        return Places(tuple(map(self.bin, range(len(offsets)))), offsets, keep)

    def append(self, block: Block, encoded: EncodedBlock) -> None:
        """Add an encoded block, the next one of the inputs, whose tokens have their places."""
        with disk_errors(self.folder):
            for key in range(len(self._targets)):
                self._files[f"{key}.lengths"].write(encoded.lengths[key].astype("<i4", copy=False).data)
                self._files[f"{key}.text_bytes"].write(encoded.text_bytes[key].astype("<i8", copy=False).data)
            if encoded.digests is not None:
                self._files["digests"].write(encoded.digests.data)
        position = self.position
        position.tokens = [n + int(part.sum()) for n, part in zip(position.tokens, encoded.lengths, strict=True)]
        position.documents += len(encoded.lengths[0])
        position.counts = dict(Counter(position.counts) + encoded.skipped)
        position.consumed += encoded.consumed
        position.text += encoded.text
        position.place = block.end
        self._write_back()

    def _write_back(self) -> None:
        for key, end in enumerate(self._token_bytes(self.position)):
            begun = self._begun[key]
            if end - begun >= WRITE_BACK:
                # The advice lets go of what is on the disk already, which is nothing yet, and has the rest put there.
                os.posix_fadvise(self._files[f"{key}.bin"].fileno(), begun, end - begun, os.POSIX_FADV_DONTNEED)
                self._begun[key] = end

    def end_input(self, number: int, source: Source) -> None:
        """All blocks of the next input file, the `number`-th of the job, are there."""
        record, position = source.record(), self.position
        self.records.append(record)
        if position.start is None:
            position.start = [number + 1, 0] if source.began is None else [number, source.began]
        position.stop = [number + 1, 0] if source.ended is None else [number, source.ended]
        position.inputs, position.place = position.inputs + 1, None
        self._pending.append(note_of(position, source, record))

    def note(self, inside: Source | None, due: bool = False) -> None:
        """Sync what is there and note the position: between input files, or inside one.

        Args:
            due: only if the last note is some seconds old.
        """
        if due and time.monotonic() - self._noted < SECONDS_BETWEEN_NOTES:
            return
        self._settle()
        notes = [*self._pending, *([note_of(self.position, inside, None)] if inside else [])]
        with disk_errors(self.folder):
            for handle in self._files.values():
                handle.flush()
                os.fsync(handle.fileno())
            self._journal.notes += notes
            if self._notes is None:
                self._write_journal()
            else:
                self._append_to_journal(notes)
        self._pending = []
        self._noted, self.noted = time.monotonic(), self.position.documents

    def _append_to_journal(self, notes: Sequence[dict[str, Any]]) -> None:
        assert self._notes is not None
        self._notes.write("".join(json.dumps(note) + "\n" for note in notes))
        self._notes.flush()
        os.fsync(self._notes.fileno())

    def note_all_done(self) -> None:
        """Note that all is encoded: from here on datasets get their names."""
        self.note(None)
        self.finishing = True
        with disk_errors(self.folder):
            self._append_to_journal([{"finishing": True}])

    def leave(self) -> None:
        """Let go of the folder; a later run goes on from its last note. Without any note it is deleted."""
        if not (self.folder / JOURNAL).exists():
            self.remove()
            return
        self._close()
        self._lock.close()

    def remove(self) -> None:
        """Delete the folder and what is left in it."""
        self._close()
        for path in self.folder.iterdir():
            path.unlink()
        self._lock.close()
        # Somebody else may have taken it by now.
        with suppress(OSError):
            self.folder.rmdir()

    def _close(self) -> None:
        handles: list[IO[Any]] = [*self._files.values(), *([self._notes] if self._notes else [])]
        for handle in handles:
            # On a full disk closing fails as well; what was noted is safe.
            with suppress(OSError):
                handle.close()
