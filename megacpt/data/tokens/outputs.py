"""Token datasets in the making: nothing carries a finished dataset's name before all of it is on disk."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megacpt.data.tokens.indexed import bin_path, idx_path, write_document_index
from megacpt.data.tokens.lengths import length_statistics
from megacpt.data.tokens.manifest import Manifest, manifest_path, write_manifest
from megacpt.data.tokens.work import Work
from megacpt.errors import UserError
from megacpt.files import atomic_write, disk_errors, sync_directory


@dataclass(frozen=True)
class Dataset:
    """One key's dataset."""

    key: str
    prefix: str


def digests_path(prefix: str | Path) -> Path:
    """`PREFIX.digests`, for the merge to drop what two of several jobs have: of the job's documents the digests, uint64
    [documents, 2], and after them the bytes of their text, int64 [documents]."""
    return Path(f"{prefix}.digests")


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


def with_counts(common: Manifest, key: str, lengths: np.ndarray, text_bytes: int | None) -> Manifest:
    """A manifest with what follows from the tokens of each document, [documents], and their text's bytes filled in."""
    statistics = length_statistics(lengths)
    empty = statistics.histogram.get("0", 0)
    return replace(
        common,
        json_key=key,
        documents=len(lengths),
        tokens=int(lengths.sum(dtype=np.int64)),
        eod_tokens=len(lengths) - empty if common.append_eod else 0,
        text_bytes=text_bytes,
        empty_documents=empty,
        lengths=statistics,
    )


def refuse_if_empty(manifest: Manifest) -> None:
    """Raise where a dataset would hold no token."""
    if manifest.tokens:
        return
    dropped = manifest.skipped | {"too short": manifest.too_short, "duplicates": manifest.duplicates}
    counts = ", ".join(f"{count:,} {kind}" for kind, count in dropped.items() if count)
    why = f" ({counts} skipped)" if counts else ""
    raise UserError(f"the corpus is empty: no document has any text under {manifest.json_key!r}{why}; check --input")


def finish(work: Work, datasets: Sequence[Dataset], common: Manifest) -> dict[str, Manifest]:
    """Turn the work into datasets: index and manifest of each key, and when all of them are there the `.bin` files.

    What an earlier run had given its name already is left as it is.

    Args:
        common: what all keys share; key and counts are filled in here.

    Raises:
        UserError: a dataset would hold no token (one of several jobs may), or the disk is full; neither index nor
            manifest is left.
    """
    manifests = {
        dataset.prefix: with_counts(common, dataset.key, work.lengths(number), int(work.text_bytes(number).sum()))
        for number, dataset in enumerate(datasets)
    }
    for manifest in manifests.values():
        if manifest.shard is None:
            refuse_if_empty(manifest)
    if not work.finishing:
        work.note_all_done()
    written: list[Path] = []
    unnamed = [(number, dataset) for number, dataset in enumerate(datasets) if work.bin(number).exists()]
    try:
        for number, dataset in unnamed:
            with disk_errors(bin_path(dataset.prefix)):
                bin_path(dataset.prefix).unlink(missing_ok=True)
            written += [path(dataset.prefix) for path in (idx_path, manifest_path, digests_path)]
            manifest = manifests[dataset.prefix]
            write_document_index(dataset.prefix, np.dtype(manifest.dtype), work.lengths(number))
            _write_digests(work, number, dataset.prefix, manifest)
            write_manifest(dataset.prefix, manifest)
    except BaseException:
        for path in filter(Path.is_file, written):
            path.unlink()
        raise
    for number, dataset in unnamed:
        with disk_errors(bin_path(dataset.prefix)):
            os.replace(work.bin(number), bin_path(dataset.prefix))
            sync_directory(bin_path(dataset.prefix).parent)
    return manifests


def _write_digests(work: Work, key: int, prefix: str, manifest: Manifest) -> None:
    if manifest.shard is None or manifest.filters is None or manifest.filters.dedup == "none":
        digests_path(prefix).unlink(missing_ok=True)
        return
    with atomic_write(digests_path(prefix)) as handle:
        for digests in work.digests():
            handle.write(digests.tobytes())
        handle.write(work.text_bytes(key).tobytes())
