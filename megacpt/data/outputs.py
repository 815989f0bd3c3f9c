"""Token datasets in the making: nothing carries a finished dataset's name before all of it is on disk."""

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from megacpt.data.indexed import bin_path, idx_path, write_index
from megacpt.data.manifest import Manifest, manifest_path, write_manifest
from megacpt.errors import UserError
from megacpt.files import disk_errors


@dataclass
class Output:
    """One key's dataset in the making: its open `.bin` and the tokens of each document so far (int32)."""

    key: str
    prefix: str
    handle: IO[bytes]
    lengths: array


def clear_the_way(prefix: str, overwrite: bool) -> None:
    """Refuse to replace a dataset unasked; remove temporary files of runs that were killed."""
    existing = [str(path) for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)) if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{', '.join(existing)}: exists already; pass --overwrite or choose another --output-prefix")
    for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)):
        for partial in path.parent.glob(f".{path.name}.*.partial"):
            owner = partial.name.split(".")[-2]
            if owner.isdigit() and not _runs(int(owner)):
                with disk_errors(partial):
                    partial.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def finish(outputs: Sequence[Output], common: Manifest) -> dict[str, Manifest]:
    """Write index and manifest of each key while its `.bin` still has its temporary name; the caller renames that last.

    Args:
        common: what all keys share; key and counts are filled in here.

    Raises:
        UserError: a dataset would hold no token, or the disk is full; neither index nor manifest is left.
    """
    manifests: dict[str, Manifest] = {}
    for output in outputs:
        lengths = np.frombuffer(output.lengths, dtype=np.int32)
        if not lengths.any():
            counts = ", ".join(f"{count:,} {kind}" for kind, count in common.skipped.items())
            why = f" ({counts} skipped)" if counts else ""
            raise UserError(f"the corpus is empty: no document has any text under {output.key!r}{why}; check --input")
        output.handle.flush()
        os.fsync(output.handle.fileno())
        manifests[output.prefix] = replace(
            common,
            json_key=output.key,
            documents=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            empty_documents=int((lengths == 0).sum()),
        )
    written: list[Path] = []
    try:
        for output in outputs:
            bin_path(output.prefix).unlink(missing_ok=True)
            written += [idx_path(output.prefix), manifest_path(output.prefix)]
            lengths = np.frombuffer(output.lengths, dtype=np.int32)
            # A document without tokens has no sequence.
            documents = np.concatenate([[0], np.cumsum(lengths > 0)])
            manifest = manifests[output.prefix]
            write_index(output.prefix, np.dtype(manifest.dtype), lengths[lengths > 0], documents)
            write_manifest(output.prefix, manifest)
    except BaseException:
        for path in filter(Path.is_file, written):
            path.unlink()
        raise
    return manifests
