"""What an interrupted import or export leaves behind, and how the same command finds it and goes on.

A hidden folder holds what is finished, and a record of the job: a fingerprint of all that the result depends on.
Another job, or the same one on a source that has changed since, empties the folder first. Ranks act together: what
fails on one is raised on all, so that none goes on writing while another cleans up.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megacpt.errors import UserError
from megacpt.files import disk_errors, make_folder, write_json

RECORD = "job.json"
HEAD_BYTES = 65_536
"""What is hashed of every source file: the header, in all formats that are read."""


class Report(NamedTuple):
    """Whom to tell: parameters that have been converted, and (with a sentence) those that an earlier start had."""

    done: Callable[[int], object] = lambda count: None
    resumed: Callable[[int, str], object] = lambda count, sentence: None


@dataclass(frozen=True)
class Ranks:
    """This process among those that convert together; `gather` gives every rank's value to all, in order."""

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] = field(default=lambda value: [value])

    def together[T](self, step: Callable[[], T]) -> list[T]:
        """Run a step on every rank, wait for all, and give all results to all.

        Raises:
            UserError: that of the first rank on which the step raised one, on every rank.
        """
        result, failure = None, None
        try:
            result = step()
        except UserError as error:
            failure = error
        outcomes = self.gather((result, failure))
        for _, failed in outcomes:
            if failed is not None:
                raise failed
        return [value for value, _ in outcomes]


def describe_files(files: Iterable[Path]) -> list[list[Any]]:
    """What tells a file from any other and from its own later self: path, size, times, hash of its beginning.

    The time of the last change of the inode is among them, for nothing that a user does sets it back.
    """
    found: list[list[Any]] = []
    for path in sorted(files):
        with open(path, "rb") as handle:
            stat = os.fstat(handle.fileno())
            head = hashlib.sha256(handle.read(HEAD_BYTES)).hexdigest()
        found.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, head])
    return found


def take_up(folder: Path, job: Mapping[str, Any]) -> bool:
    """Make `folder` ready for a job: as it is where an interrupted start of the same job left it (then True), or empty.

    Raises:
        UserError: what is there cannot be removed or written.
    """
    # As JSON gives it back: lists for tuples.
    wanted = json.loads(json.dumps(job))
    try:
        if json.loads((folder / RECORD).read_text(encoding="utf-8")) == wanted:
            return True
    except (OSError, ValueError):
        pass
    with disk_errors(folder):
        if folder.exists():
            shutil.rmtree(folder)
    make_folder(folder)
    write_json(folder / RECORD, wanted)
    return False


def lock_of(folder: Path) -> Path:
    """The lock that belongs to a hidden folder."""
    return folder.with_name(f"{folder.name}.lock")
