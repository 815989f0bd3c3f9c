"""The unfinished part of a scoring run: scores so far and a journal, in a hidden folder beside the output.

Each line of the journal stands for one piece of the input, in order: how many scores it has, and what was dropped.
After a kill the scores are cut back to the last whole line, and the run goes on with the next piece.
"""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megacpt.files import disk_errors, lock

ITEM = np.dtype("<f4").itemsize


class ScoreWork:
    """Scores that an earlier run of the same job left, and those that are added.

    Args:
        job: what the scores depend on; the work of another job is thrown away.

    Attributes:
        done: pieces of the input that have their scores.
        documents: scores so far.
        dropped: rows passed over so far, by kind.

    Raises:
        UserError: another process writes there, or nobody can.
    """

    def __init__(self, output: Path, job: dict[str, Any]) -> None:
        self._folder = output.parent / f".{output.name}.work"
        self._lock = lock(self._folder / "lock", f"{self._folder} (another run for {output.name})")
        self._scores, self._journal = self._folder / "scores", self._folder / "journal.jsonl"
        self.dropped: Counter[str] = Counter()
        entries = self._read(json.loads(json.dumps(job)))
        self.done, self.documents = len(entries), sum(documents for documents, _ in entries)
        for _, dropped in entries:
            self.dropped.update(dropped)
        with disk_errors(self._folder):
            header = [json.dumps({"job": job})]
            self._journal.write_text("\n".join([*header, *map(json.dumps, entries)]) + "\n", encoding="utf-8")
            with open(self._scores, "ab") as handle:
                handle.truncate(self.documents * ITEM)
            self._handles = (open(self._scores, "ab"), open(self._journal, "a", encoding="utf-8"))  # noqa: SIM115

    def _read(self, job: dict[str, Any]) -> list[tuple[int, dict[str, int]]]:
        try:
            # What comes after the last line's end was cut short.
            header, *entries = map(json.loads, self._journal.read_text(encoding="utf-8").split("\n")[:-1])
            size = self._scores.stat().st_size
        except (OSError, ValueError):
            return []
        if header != {"job": job}:
            return []
        whole, total = [], 0
        for documents, dropped in entries:
            total += documents
            if total * ITEM > size:
                break
            whole.append((documents, dropped))
        return whole

    def append(self, scores: np.ndarray, dropped: Counter[str]) -> None:
        """Add the scores of the next piece."""
        with disk_errors(self._folder):
            self._handles[0].write(scores.astype("<f4", copy=False).tobytes())
            self._handles[0].flush()
            self._handles[1].write(json.dumps((len(scores), dropped)) + "\n")
            self._handles[1].flush()
        self.done += 1
        self.documents += len(scores)
        self.dropped += dropped

    def values(self) -> np.ndarray:
        """All scores so far: float32 [documents]."""
        return np.fromfile(self._scores, dtype="<f4")

    def leave(self) -> None:
        """Let go of the folder; the same job goes on from here."""
        for handle in (*self._handles, self._lock):
            handle.close()

    def remove(self) -> None:
        """Delete the folder and what is left in it."""
        self.leave()
        shutil.rmtree(self._folder, ignore_errors=True)
