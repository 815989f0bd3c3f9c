"""Which files the inputs of a command line are: files, folders and globs."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megacpt.errors import UserError
from megacpt.files import is_record

IN_A_FOLDER = re.compile(r"\.(jsonl?(\.gz|\.zst)?|parquet)$")
READABLE = (".jsonl", ".json", ".gz", ".zst", ".parquet")


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Resolve files, folders and globs to files.

    Patterns keep the order in which they were given; the files of a folder (searched to any depth and through links,
    .jsonl, .json, .jsonl.gz, .jsonl.zst and .parquet alone) and of a glob are sorted by path.

    Raises:
        UserError: a pattern matches nothing or a link to nothing, a file is of an unknown kind, or is matched twice.
    """
    paths: list[Path] = []
    found: dict[Path, str] = {}
    for pattern in patterns:
        for path in _expand(pattern):
            if path.suffix not in READABLE:
                raise UserError(f"{path}: unknown kind of input; give .jsonl, .json, .jsonl.gz, .jsonl.zst or .parquet")
            key = path.resolve()
            if key in found:
                raise UserError(f"{path}: given twice (by {found[key]!r} and by {pattern!r}); give each input once")
            found[key] = pattern
            paths.append(path)
    return paths


def unreadable(path: str | Path, error: OSError) -> UserError:
    """What is said of a file or folder that the system does not let one read."""
    return UserError(f"{path}: cannot be read ({error.strerror or error})")


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern)
    try:
        if path.is_file():
            return [path]
        if path.is_dir():
            matches = [p for p in _inside(path) if IN_A_FOLDER.search(p.name) and _is_input(p)]
            if not matches:
                raise UserError(
                    f"{pattern}: this folder holds no .jsonl, .json, .jsonl.gz, .jsonl.zst or .parquet file"
                )
        else:
            matches = [p for p in map(Path, glob.glob(pattern, recursive=True)) if _is_input(p)]
            if not matches:
                raise UserError(f"{pattern}: no file matches; give an existing file, folder or glob to --input")
    except OSError as error:
        raise unreadable(error.filename or pattern, error) from error
    return sorted(matches)


def _inside(folder: Path) -> Iterator[Path]:
    """What is in a folder and in those below it, links to folders included, but for hidden names."""

    def fail(error: OSError) -> None:
        raise error

    seen: dict[str, str] = {}
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folder_itself = os.path.realpath(root)
        if folder_itself in seen:
            raise UserError(f"{root}: is by a link the same folder as {seen[folder_itself]}; give each folder once")
        seen[folder_itself] = root
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in names if not name.startswith("."))


def _is_input(path: Path) -> bool:
    """Whether this is a file, and not what was written beside a dataset, a model, scores or a subset in that folder."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: is a link to nothing; remove it or bring back what it points to")
    return path.is_file() and not (path.suffix == ".json" and (path.with_suffix(".idx").exists() or is_record(path)))
