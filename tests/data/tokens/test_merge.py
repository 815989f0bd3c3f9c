import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder as MegatronBuilder

from megacpt.data.text.provenance import Filters, InputFile
from megacpt.data.tokens.indexed import IndexedDataset, bin_path, idx_path
from megacpt.data.tokens.lengths import length_statistics
from megacpt.data.tokens.manifest import (
    Manifest,
    ShardInfo,
    TokenizerInfo,
    manifest_path,
    read_manifest,
    write_manifest,
)
from megacpt.data.tokens.merge import merge
from megacpt.errors import UserError

MANIFEST = Manifest("0.1.0", [], TokenizerInfo("T", "ab" * 32, 100, 2), True, "uint16", "text", ["text"])


def build(prefix, documents, manifest=MANIFEST, size=100):
    """Documents, each a list of sequences, as megatron-core writes them; a manifest beside them."""
    builder = MegatronBuilder(str(bin_path(prefix)), dtype=DType.optimal_dtype(size))
    for sequences in documents:
        builder.add_document([token for sequence in sequences for token in sequence], [len(s) for s in sequences])
    builder.finalize(str(idx_path(prefix)))
    if manifest is not None:
        tokens = sum(len(sequence) for sequences in documents for sequence in sequences)
        write_manifest(prefix, replace(manifest, documents=len(documents), tokens=tokens))
    return str(prefix)


documents = st.lists(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), max_size=3), min_size=1, max_size=6)


@settings(max_examples=10)  # each waits for the disk several times
@given(st.lists(documents, min_size=1, max_size=4))
def test_a_merge_is_what_megatrons_builder_makes_of_them(tmp_path_factory, datasets):
    folder = tmp_path_factory.mktemp("merge")
    datasets[0].append([[1]])
    prefixes = [build(folder / str(i), found) for i, found in enumerate(datasets)]
    builder = MegatronBuilder(str(bin_path(folder / "theirs")), dtype=DType.optimal_dtype(100))
    for prefix in prefixes:
        builder.add_index(prefix)
    builder.finalize(str(idx_path(folder / "theirs")))
    manifest = merge([f"{prefix}.idx" for prefix in prefixes], str(folder / "ours"))
    for path in (bin_path, idx_path):
        assert path(folder / "ours").read_bytes() == path(folder / "theirs").read_bytes()
    lengths = [sum(map(len, document)) for found in datasets for document in found]
    assert manifest.lengths == length_statistics(np.array(lengths, dtype=np.int32))
    assert (manifest.documents, manifest.tokens, manifest.empty_documents) == (
        len(lengths),
        sum(lengths),
        lengths.count(0),
    )
    assert read_manifest(folder / "ours") == manifest


def test_counts_are_summed_and_inputs_joined(tmp_path):
    one = replace(MANIFEST, inputs=[InputFile("a", 1, "00")], skipped={"x": 1}, too_short=2, engine="fast")
    one = replace(one, text_bytes=5)
    two = replace(
        MANIFEST, inputs=[InputFile("b", 2, "11")], skipped={"x": 2, "w": 1}, duplicates=3, filters=Filters(True)
    )
    two = replace(two, engine="reference", json_key="title", json_keys=["title"], versions={"python": "3.13"})
    prefixes = [build(tmp_path / "1", [[[1, 2]], []], one), build(tmp_path / "2", [[[3, 2]]], two)]
    manifest = merge(prefixes, str(tmp_path / "out"))
    assert manifest.inputs == [*one.inputs, *two.inputs]
    assert (manifest.skipped, manifest.too_short, manifest.duplicates) == ({"w": 1, "x": 3}, 2, 3)
    assert (manifest.engine, manifest.json_key, manifest.json_keys) == (
        "fast, reference",
        "text, title",
        ["text", "title"],
    )
    assert (manifest.eod_tokens, manifest.filters, manifest.versions) == (2, None, {"python": "3.13"})
    assert manifest.text_bytes is None
    counted = [build(tmp_path / "3", [[[1]]], replace(one, text_bytes=7)), prefixes[0]]
    assert merge(counted, str(tmp_path / "all")).text_bytes == 12


def test_a_dataset_without_a_manifest(tmp_path):
    prefixes = [build(tmp_path / "1", [[[1]]]), build(tmp_path / "2", [[[2]]], None)]
    warnings = []
    assert merge(prefixes, str(tmp_path / "out"), warn=warnings.append) is None
    assert len(warnings) == 1
    assert f"{tmp_path}/2: no manifest" in warnings[0]
    assert not manifest_path(tmp_path / "out").exists()
    assert len(IndexedDataset(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": TokenizerInfo("T", "cd" * 32, 100, 2)}, r"different tokenizers \(T cdcd.*; T abab"),
        ({"tokenizer": TokenizerInfo("T", "ab" * 32, 100, 3)}, r"EOD 3.*EOD 2"),
        ({"append_eod": False}, "only one of them has --append-eod"),
        ({"shard": ShardInfo(0, 2, "j", 0, [0, 0], [1, 0])}, "is one of 2 shards of a corpus and not all"),
    ],
)
def test_datasets_that_do_not_go_together(tmp_path, change, message):
    prefixes = [build(tmp_path / "1", [[[1]]]), build(tmp_path / "2", [[[1]]], replace(MANIFEST, **change))]
    with pytest.raises(UserError, match=message):
        merge(prefixes, str(tmp_path / "out"))
    assert list(tmp_path.glob("*out*")) == []


@pytest.mark.parametrize("manifest", [MANIFEST, None])
def test_a_dataset_given_twice_by_other_names(tmp_path, manifest):
    one = build(tmp_path / "1", [[[1]]], manifest)
    for again in (one, f"{one}.bin", f"{tmp_path}/./1", f"{tmp_path}/../{tmp_path.name}/1.idx"):
        with pytest.raises(UserError, match=r"1: given twice; give each dataset once"):
            merge([one, again], str(tmp_path / "out"))


@pytest.mark.parametrize("change", [{"documents": 2}, {"tokens": 2}])
def test_the_manifest_of_another_dataset(tmp_path, change):
    one, other = build(tmp_path / "1", [[[1]]]), build(tmp_path / "2", [[[1]]])
    write_manifest(other, replace(read_manifest(other), **change))
    with pytest.raises(
        UserError, match=r"2\.json: is of other tokens than .*2\.bin holds \(.* tokens; 1 and 1\); preprocess"
    ):
        merge([one, other], str(tmp_path / "out"))
    assert list(tmp_path.glob("*out*")) == []


def test_another_dtype(tmp_path):
    prefixes = [build(tmp_path / "1", [[[1]]]), build(tmp_path / "2", [[[1]]], size=100_000)]
    with pytest.raises(UserError, match=r"holds int32 tokens and .* holds uint16"):
        merge(prefixes, str(tmp_path / "out"))


def shards(folder, indices, count=3, **changes):
    for index in indices:
        info = ShardInfo(index, count, "job", index, [index, 0], [index + 1, 0])
        manifest = replace(MANIFEST, shard=replace(info, **changes), inputs=[InputFile(f"{index}", 1, "00")])
        yield build(folder / f"s{index}", [[[index]]], manifest)


def test_a_shard_is_missing_or_given_twice(tmp_path):
    found = list(shards(tmp_path, [0, 2]))
    with pytest.raises(UserError, match=r"of its 3 shards 1 are missing: --shard 1/3; give all of them"):
        merge(found, str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"s0: given twice"):
        merge([*found, found[0]], str(tmp_path / "out"))
    (tmp_path / "other").mkdir()
    (other,) = shards(tmp_path / "other", [0])
    with pytest.raises(UserError, match=r"are the same shard"):
        merge([*found, other], str(tmp_path / "out"))
    (foreign,) = shards(tmp_path / "other", [1], job="another")
    with pytest.raises(UserError, match=r"are shards of different jobs"):
        merge([*found, foreign], str(tmp_path / "out"))


def test_shards_that_do_not_adjoin(tmp_path):
    found = [*shards(tmp_path, [0, 2]), *shards(tmp_path, [1], start=[1, 500])]
    with pytest.raises(UserError, match=r"s0 and .*s1: rows between them are missing or in both"):
        merge(found, str(tmp_path / "out"))


def test_shards_in_another_order_are_merged_with_a_warning(tmp_path):
    found = list(shards(tmp_path, [0, 1, 2]))
    warnings = []
    manifest = merge([found[1], found[0], found[2]], str(tmp_path / "out"), warn=warnings.append)
    assert [int(IndexedDataset(tmp_path / "out").read(i)[0]) for i in range(3)] == [1, 0, 2]
    assert "not theirs" in warnings[0]
    assert [file.name for file in manifest.inputs] == ["0", "1", "2"]
    assert manifest.filters is None


def test_the_output_is_no_input_and_is_not_replaced_unasked(tmp_path):
    one = build(tmp_path / "1", [[[1]]])
    with pytest.raises(UserError, match="is one of the datasets to merge"):
        merge([one], one, overwrite=True)
    merge([one], str(tmp_path / "out"))
    with pytest.raises(UserError, match="exists already"):
        merge([one], str(tmp_path / "out"))
    merge([one, build(tmp_path / "2", [[[2]]])], str(tmp_path / "out"), overwrite=True)
    assert len(IndexedDataset(tmp_path / "out")) == 2


def test_digests_that_are_gone(tmp_path):
    found = list(shards(tmp_path, [0, 1, 2]))
    for prefix in found:
        manifest = json.loads(manifest_path(prefix).read_text())
        manifest["filters"]["dedup"] = "exact"
        manifest_path(prefix).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"s0\.digests: missing"):
        merge(found, str(tmp_path / "out"))


def test_a_bin_that_is_not_back_to_back(tmp_path):
    one = build(tmp_path / "1", [[[1]]])
    with open(bin_path(one), "ab") as handle:
        handle.write(b"\0\0")
    with pytest.raises(UserError, match="do not lie back to back"):
        merge([one], str(tmp_path / "out"))
