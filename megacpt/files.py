"""Files that appear whole or not at all: written to a temporary name, synced, renamed."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from types import UnionType
from typing import IO, Any, get_args, get_origin, get_type_hints

from megacpt.errors import DiskError, UserError

UNWRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
    *(errno.EFBIG, errno.EIO),
)

LARGEST_RECORD = 1 << 26
"""Bytes; a record names each input in about 150."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "disk full", "not permitted" and the like while writing `path` into a DiskError that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(f"{path}: the disk is full; free space and run the same command again") from error
        # Where no file can be made at all, as in /proc, the system says that there is none.
        unmade = error.errno == errno.ENOENT and error.filename and Path(error.filename).parent == path.parent
        if error.errno in UNWRITABLE or unmade:
            raise DiskError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are not there yet.

    Raises:
        UserError: it cannot be made there, for whatever reason the system gives.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another place") from error


def keep_apart(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Refuse outputs that are inputs or one another, before anything is replaced.

    Raises:
        UserError: such an output, or one that is a folder.
    """
    read, written = {path.resolve() for path in inputs}, set[Path]()
    for path in outputs:
        place = path.resolve()
        if place in read:
            raise UserError(f"{path}: is read by this command, which would replace it; choose another place to write")
        if place in written:
            raise UserError(f"{path}: would be written twice; give each output a name of its own")
        if place.is_dir():
            raise UserError(f"{path}: is a folder; give the name of a file in it")
        written.add(place)


def lock(path: Path, what: str) -> IO[str]:
    """Take `path` (made if need be) as a lock: held until the returned file is closed, or this process ends.

    Raises:
        UserError: another process holds it; the sentence says that `what` is in use.
    """
    make_folder(path.parent)
    with disk_errors(path):
        handle = open(path, "w", encoding="utf-8")  # noqa: SIM115, its life is the lock's
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.close()
        raise UserError(f"{what} is in use by another process; wait for it, or choose another place") from error
    return handle


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold `path` as a lock; afterwards it is gone, and so are folders that were made for it and are empty.

    Raises:
        UserError: another process holds it; the sentence says that `what` is in use.
    """
    made = list(takewhile(lambda folder: not folder.exists(), path.parents))
    while True:
        handle = lock(path, what)
        # Its former holder may have removed the file between our opening and our locking it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                break
        handle.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        handle.close()
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def sync_directory(folder: Path) -> None:
    """fsync a folder, so that a rename inside it survives a power cut; or a file that a library wrote."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success sync it and rename it onto `path`, on failure remove it.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    make_folder(path.parent)
    with disk_errors(path):
        try:
            with open(partial, mode, encoding=None if "b" in mode else "utf-8") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_write(path, "w") as handle:
        handle.write(text)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # Bytes of a file's name that are not UTF-8 are lone surrogates, which JSON can say by an escape alone.
    write_text(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))


def json_beside(path: str | Path) -> Path:
    """`PATH.json`, where a file's record lies; the path may itself contain dots."""
    return Path(f"{path}.json")


def read_json(path: Path, form: str) -> dict[str, Any]:
    """The JSON object in a file that calls itself `form` under the key "format".

    Raises:
        FileNotFoundError: there is no such file.
        OSError, ValueError: it cannot be read, or is something else.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("format") != form:
        raise ValueError(f"its format is not {form!r}")
    return found


def read_as[Kind](kind: type[Kind], path: Path, form: str) -> Kind:
    """As `read_json`, put into a dataclass.

    Raises:
        FileNotFoundError: there is no such file.
        OSError, ValueError, TypeError: it cannot be read, or its fields are not those of `kind` or not of their types.
    """
    values, hints = read_json(path, form), get_type_hints(kind)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise ValueError(f"{name!r} is of the wrong type")
    return kind(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is of a type as dataclasses are annotated with: plain ones, lists, dicts, unions."""
    if hint is Any:
        return True
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    kind: Any = get_origin(hint) or hint
    inner = get_args(hint)
    kinds = (int, float) if kind is float else (kind,)
    # bool is a subclass of int, and a whole number is a float in JSON.
    if isinstance(value, bool) != (kind is bool) or not issubclass(type(value), kinds):
        return False
    return not inner or all(_fits(item, inner[-1]) for item in (value.values() if kind is dict else value))


def is_record(path: Path) -> bool:
    """Whether `path`, a `.json`, is the record that this package wrote beside a file that is there (`json_beside`)."""
    if not path.with_suffix("").is_file() or path.stat().st_size > LARGEST_RECORD:
        return False
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and str(found.get("format")).startswith("megacpt ")


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content, read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
