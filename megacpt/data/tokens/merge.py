"""Token datasets joined into one: their documents one after another, in the order given.

The outputs of jobs that had a shard of one corpus each give the bytes of one run over all of it: a document whose text
an earlier shard had is dropped, as that run drops it.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from megacpt.data.text.filtering import DIGEST_BYTES, DigestSet
from megacpt.data.tokens.indexed import IndexedDataset, bin_path, idx_path, parts, write_header, write_pointers
from megacpt.data.tokens.manifest import Manifest, manifest_path, read_manifest, write_manifest
from megacpt.data.tokens.merged_manifest import check_shards, in_order, merged_manifest
from megacpt.data.tokens.outputs import clear_the_way, digests_path, refuse_if_empty, with_counts
from megacpt.data.tokens.work import SIZE_BYTES
from megacpt.errors import UserError
from megacpt.files import atomic_write

COPY_BYTES = 1 << 24
DIGESTS_AT_ONCE = 1 << 16


@dataclass
class Part:
    """One of the datasets, and which of its documents are kept: bool [documents], or None for all."""

    prefix: str
    data: IndexedDataset
    manifest: Manifest | None
    kept: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document that is kept."""
        return self.data.lengths if self.kept is None else self.data.lengths[self.kept]

    def sequences(self) -> Iterator[np.ndarray]:
        """Tokens of each sequence that is kept, array by array."""
        if self.kept is None:
            return parts(self.data.sequences)
        return (part[part > 0] for part in parts(self.lengths))

    def ends(self) -> Iterator[np.ndarray]:
        """The sequence after the last one of each document that is kept, int64, array by array."""
        if self.kept is None:
            return parts(self.data.boundaries[1:])
        return parts(np.cumsum(self.lengths > 0, dtype=np.int64))

    def write_tokens(self, handle: IO[bytes]) -> None:
        """Append the tokens that are kept."""
        with open(bin_path(self.prefix), "rb") as source:
            if self.kept is None:
                shutil.copyfileobj(source, handle, COPY_BYTES)
                return
            ends = np.cumsum(self.data.lengths) * self.data.dtype.itemsize
            edges = np.flatnonzero(np.diff(self.kept.astype(np.int8), prepend=0, append=0))
            for first, stop in zip(edges[::2], edges[1::2], strict=True):
                source.seek(ends[first - 1] if first else 0)
                left = int(ends[stop - 1]) - source.tell()
                while left:
                    left -= handle.write(source.read(min(left, COPY_BYTES)))


def merge(
    prefixes: Sequence[str], output_prefix: str, overwrite: bool = False, warn: Callable[[str], None] = lambda _: None
) -> Manifest | None:
    """Join datasets into `OUTPUT_PREFIX.{bin,idx,json}`; its manifest, or None where one of them has none.

    Args:
        prefixes: of the datasets; a trailing .bin or .idx is ignored.
        warn: told what the user should know and may well have meant.

    Raises:
        UserError: datasets that do not go together, shards that are not a whole set, files that cannot be read.
    """
    prefixes = [prefix.removesuffix(".bin").removesuffix(".idx") for prefix in prefixes]
    if Path(output_prefix).resolve() in {Path(prefix).resolve() for prefix in prefixes}:
        raise UserError(f"{output_prefix}: is one of the datasets to merge; choose another --output-prefix")
    _check_names(prefixes)
    found = [
        Part(prefix, data, _manifest_of(prefix, data))
        for prefix, data in zip(prefixes, map(_opened, prefixes), strict=True)
    ]
    _check_dtypes(found)
    manifest = _common_manifest(found, warn)
    clear_the_way(output_prefix, overwrite)
    if manifest is not None:
        dropped, dropped_bytes = _drop_repeated(found)
        lengths = np.concatenate([part.lengths.astype(np.int32) for part in found])
        text_bytes = None if manifest.text_bytes is None else manifest.text_bytes - dropped_bytes
        manifest = replace(manifest, duplicates=manifest.duplicates + dropped)
        manifest = with_counts(manifest, manifest.json_key, lengths, text_bytes)
        refuse_if_empty(manifest)
    _write(found, output_prefix, manifest)
    return manifest


def _opened(prefix: str) -> IndexedDataset:
    data = IndexedDataset(prefix)
    size = bin_path(prefix).stat().st_size
    if not data.is_back_to_back() or data.tokens * data.dtype.itemsize != size:
        raise UserError(f"{prefix}: its documents do not lie back to back in its .bin; preprocess the corpus again")
    return data


def _manifest_of(prefix: str, data: IndexedDataset) -> Manifest | None:
    manifest = read_manifest(prefix)
    if manifest is None:
        return None
    said, held = (manifest.documents, manifest.tokens), (len(data), data.tokens)
    if said != held:
        raise UserError(
            f"{manifest_path(prefix)}: is of other tokens than {bin_path(prefix)} holds ({said[0]:,} documents and "
            f"{said[1]:,} tokens; {held[0]:,} and {held[1]:,}); preprocess the corpus again"
        )
    return manifest


def _check_names(prefixes: Sequence[str]) -> None:
    counts = Counter(bin_path(prefix).resolve() for prefix in prefixes)
    for prefix in prefixes:
        if counts[bin_path(prefix).resolve()] > 1:
            raise UserError(f"{prefix}: given twice; give each dataset once")


def _check_dtypes(found: Sequence[Part]) -> None:
    for part in found[1:]:
        if part.data.dtype != found[0].data.dtype:
            raise UserError(
                f"{part.prefix}: holds {part.data.dtype.name} tokens and {found[0].prefix} holds "
                f"{found[0].data.dtype.name}; only datasets of one tokenizer can be merged"
            )


def _common_manifest(found: Sequence[Part], warn: Callable[[str], None]) -> Manifest | None:
    without = [part.prefix for part in found if part.manifest is None]
    manifests = {part.prefix: part.manifest for part in found if part.manifest is not None}
    check_shards(manifests, len(found))
    if without:
        warn(
            f"{', '.join(without)}: no manifest, so that nobody can check which tokenizer made it; "
            "the merged dataset gets none either"
        )
        return None
    if not in_order(list(manifests.values())):
        warn("the shards are merged in the order given, which is not theirs: one run would write another order")
    return merged_manifest(manifests)


def _drop_repeated(found: Sequence[Part]) -> tuple[int, int]:
    """Mark documents of shards whose text an earlier one of them had; how many, and the bytes of their text."""
    if any(p.manifest is None or p.manifest.shard is None or p.manifest.filters is None for p in found):
        return 0, 0
    if any(p.manifest and p.manifest.filters and p.manifest.filters.dedup == "none" for p in found):
        return 0, 0
    seen, dropped, dropped_bytes = DigestSet(), 0, 0
    for part in found:
        path, count = digests_path(part.prefix), len(part.data)
        if not path.is_file() or path.stat().st_size != (DIGEST_BYTES + SIZE_BYTES) * count:
            raise UserError(
                f"{path}: missing or not of this shard, and --dedup needs it to compare shards; encode the shard again"
            )
        words = np.memmap(path, dtype="<u8", mode="r") if count else np.empty(0, "<u8")
        digests, text_bytes = words[: 2 * count].reshape(-1, 2), words[2 * count :]
        new = [seen.add(digests[i : i + DIGESTS_AT_ONCE]) for i in range(0, count, DIGESTS_AT_ONCE)]
        part.kept = np.concatenate([np.empty(0, dtype=bool), *new])
        dropped += int((~part.kept).sum())
        dropped_bytes += int(text_bytes[~part.kept].sum())
    return dropped, dropped_bytes


def _write(found: Sequence[Part], prefix: str, manifest: Manifest | None) -> None:
    """The files; the `.bin` gets its name last."""
    try:
        with atomic_write(bin_path(prefix)) as handle:
            for part in found:
                part.write_tokens(handle)
            bin_path(prefix).unlink(missing_ok=True)
            _write_index(found, prefix)
            if manifest is not None:
                write_manifest(prefix, manifest)
            else:
                manifest_path(prefix).unlink(missing_ok=True)
    except BaseException:
        if not bin_path(prefix).exists():
            for path in filter(Path.is_file, (idx_path(prefix), manifest_path(prefix))):
                path.unlink()
        raise


def _write_index(found: Sequence[Part], prefix: str) -> None:
    sequences = [sum(map(len, part.sequences())) for part in found]
    documents = sum(len(part.lengths) for part in found)
    with atomic_write(idx_path(prefix)) as handle:
        dtype = found[0].data.dtype.newbyteorder("=")
        write_header(handle, dtype, sum(sequences), documents + 1)
        for part in found:
            for lengths in part.sequences():
                handle.write(lengths.astype("<i4").tobytes())
        write_pointers(handle, dtype, (lengths for part in found for lengths in part.sequences()))
        handle.write(np.zeros(1, dtype="<i8").tobytes())
        before = 0
        for part, count in zip(found, sequences, strict=True):
            for ends in part.ends():
                handle.write((ends.astype("<i8") + before).tobytes())
            before += count
