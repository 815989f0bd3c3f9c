"""Whether datasets go together, by their manifests, and the manifest of all of them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from megacpt import __version__
from megacpt.data.text.provenance import Filters, InputFile
from megacpt.data.tokens.manifest import Manifest
from megacpt.errors import UserError


def check_shards(manifests: Mapping[str, Manifest], datasets: int) -> None:
    """Refuse outputs of `--shard` that are not one whole set.

    Args:
        manifests: by prefix.
        datasets: how many there are, those without a manifest included.
    """
    shards = {prefix: manifest.shard for prefix, manifest in manifests.items() if manifest.shard is not None}
    if not shards:
        return
    one, first = next(iter(shards.items()))
    if len(shards) < datasets:
        raise UserError(
            f"{one}: is one of {first.count} shards of a corpus and not all of --input are; merge these first"
        )
    by_index: dict[int, str] = {}
    for prefix, shard in shards.items():
        if (shard.job, shard.count, manifests[prefix].json_key) != (first.job, first.count, manifests[one].json_key):
            raise UserError(
                f"{prefix} and {one}: are shards of different jobs (inputs, options or key); merge one job's"
            )
        if shard.index in by_index:
            raise UserError(f"{prefix} and {by_index[shard.index]}: are the same shard; give each shard once")
        by_index[shard.index] = prefix
    missing = [index for index in range(first.count) if index not in by_index]
    if missing:
        names = ", ".join(f"{index}/{first.count}" for index in missing[:8])
        raise UserError(
            f"{one}: of its {first.count} shards {len(missing)} are missing: --shard {names}; give all of them"
        )
    in_turn = [(by_index[index], shards[by_index[index]]) for index in range(first.count)]
    for (before, left), (after, right) in pairwise([item for item in in_turn if item[1].start is not None]):
        if left.stop != right.start:
            raise UserError(f"{before} and {after}: rows between them are missing or in both; encode both shards again")


def in_order(manifests: Sequence[Manifest]) -> bool:
    """Whether shards, if these are shards, stand in their own order."""
    indices = [manifest.shard.index for manifest in manifests if manifest.shard is not None]
    return indices == sorted(indices)


def merged_manifest(manifests: Mapping[str, Manifest]) -> Manifest:
    """The manifest of datasets joined in this order, but for what follows from the lengths of documents.

    Raises:
        UserError: they are of different tokenizers, or only some end their documents with EOD.
    """
    one, first = next(iter(manifests.items()))
    for prefix, manifest in manifests.items():
        if manifest.tokenizer != first.tokenizer:
            raise UserError(
                f"{prefix} and {one}: were encoded by different tokenizers "
                f"({_described(manifest)}; {_described(first)}); preprocess one of the corpora again"
            )
        if manifest.append_eod != first.append_eod:
            raise UserError(f"{prefix} and {one}: only one of them has --append-eod; preprocess one of them again")
    found = list(manifests.values())
    return replace(
        first,
        megacpt_version=__version__,
        inputs=_inputs(found),
        json_key=_agreed(manifest.json_key for manifest in found),
        json_keys=list(dict.fromkeys(key for manifest in found for key in manifest.json_keys)),
        text_bytes=_text_bytes(found),
        skipped=dict(sorted(sum((Counter(manifest.skipped) for manifest in found), Counter()).items())),
        too_short=sum(manifest.too_short for manifest in found),
        duplicates=sum(manifest.duplicates for manifest in found),
        filters=_filters(found),
        tokenizer_model=next((manifest.tokenizer_model for manifest in found if manifest.tokenizer_model), ""),
        engine=_agreed(manifest.engine for manifest in found),
        versions={
            name: _agreed(manifest.versions[name] for manifest in found if name in manifest.versions)
            for name in dict.fromkeys(name for manifest in found for name in manifest.versions)
        },
        shard=None,
    )


def _text_bytes(found: Sequence[Manifest]) -> int | None:
    counts = [manifest.text_bytes for manifest in found]
    return None if None in counts else sum(count for count in counts if count is not None)


def _described(manifest: Manifest) -> str:
    tokenizer = manifest.tokenizer
    return f"{tokenizer.type} {tokenizer.sha256[:12]}, vocabulary {tokenizer.vocab_size:,}, EOD {tokenizer.eod_id}"


def _agreed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _inputs(found: Sequence[Manifest]) -> list[InputFile]:
    """All input files in order; of shards, each file once, as the one that reached its end knows it."""
    if found[0].shard is None:
        return [file for manifest in found for file in manifest.inputs]
    files: dict[int, InputFile] = {}
    for manifest in found:
        assert manifest.shard is not None
        for number, file in enumerate(manifest.inputs, manifest.shard.first_input):
            if file.sha256 or number not in files:
                files[number] = file
    return [files[number] for number in sorted(files)]


def _filters(found: Sequence[Manifest]) -> Filters | None:
    """What one run over the inputs would have to be told for these documents in this order, if it can be told."""
    first = found[0]
    same = all(manifest.filters == first.filters for manifest in found)
    one_run = first.filters is not None and (first.filters.dedup == "none" or first.shard is not None)
    return first.filters if same and one_run and in_order(found) else None
