import json
from dataclasses import replace

import pytest

from megacpt.data.text.provenance import Filters, InputFile
from megacpt.data.tokens.lengths import LengthStatistics
from megacpt.data.tokens.manifest import (
    Manifest,
    ShardInfo,
    TokenizerInfo,
    manifest_path,
    read_manifest,
    write_manifest,
)
from megacpt.errors import UserError

MANIFEST = Manifest(
    megacpt_version="0.1.0",
    inputs=[InputFile("a.jsonl", 10, "00ff")],
    json_key="text",
    tokenizer=TokenizerInfo("SentencePieceTokenizer", "abcd", 32_000, 2),
    append_eod=True,
    documents=3,
    tokens=40,
    empty_documents=1,
    dtype="uint16",
    skipped={"invalid_json": 2},
    json_keys=["text", "title"],
    eod_tokens=2,
    text_bytes=171,
    too_short=4,
    duplicates=5,
    filters=Filters(True, 20, "exact"),
    lengths=LengthStatistics(0, 13.333, 1, 39, 39, 39, {"0": 1, "1": 1, "32": 1}),
    engine="tokenizers 0.1",
    versions={"python": "3.12.1"},
    shard=ShardInfo(1, 3, "abcd", 0, None, [1, 0]),
)


@pytest.mark.parametrize("eod", [2, None])
def test_round_trip(tmp_path, eod):
    tokenizer = TokenizerInfo("HuggingFaceTokenizer", "abcd", 10, eod)
    manifest = Manifest(**{**MANIFEST.__dict__, "tokenizer": tokenizer})
    write_manifest(tmp_path / "a.b", manifest)
    assert manifest_path(tmp_path / "a.b").name == "a.b.json"
    assert read_manifest(tmp_path / "a.b") == manifest


def test_a_dataset_of_another_tool_has_none(tmp_path):
    assert read_manifest(tmp_path / "x") is None


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"{}", b'{"format": "something else"}'])
def test_a_file_that_is_no_manifest(tmp_path, content):
    manifest_path(tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json: .*preprocess the corpus again"):
        read_manifest(tmp_path / "x")


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (("documents",), "3", "documents"),
        (("documents",), True, "documents"),
        (("tokens",), -1, "tokens"),
        (("inputs",), {}, "inputs"),
        (("inputs", 0), "a.jsonl", r"inputs\[0\]"),
        (("inputs", 0, "sha256"), None, r"inputs\[0\]\.sha256"),
        (("tokenizer",), None, "tokenizer"),
        (("tokenizer", "vocab_size"), None, r"tokenizer\.vocab_size"),
        (("tokenizer", "eod_id"), "2", r"tokenizer\.eod_id"),
        (("append_eod",), 1, "append_eod"),
        (("skipped",), [], "skipped"),
        (("filters", "min_chars"), -1, r"filters\.min_chars"),
        (("lengths", "median"), 1.5, r"lengths\.median"),
        (("versions", "python"), 3, r"versions\.python"),
        (("shard", "stop"), "x", r"shard\.stop"),
        (("skipped", "invalid_json"), "many", r"skipped\.invalid_json"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, keys, value, named):
    write_manifest(tmp_path / "x", MANIFEST)
    found = json.loads(manifest_path(tmp_path / "x").read_text())
    inner = found
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    manifest_path(tmp_path / "x").write_text(json.dumps(found))
    with pytest.raises(UserError, match=f"'{named}' is missing or of the wrong type"):
        read_manifest(tmp_path / "x")


def test_a_manifest_of_the_first_version(tmp_path):
    old = {
        "megacpt_version": "0.1.0",
        "inputs": [{"name": "a.jsonl", "bytes": 10, "sha256": "00ff"}],
        "tokenizer": {"type": "SentencePieceTokenizer", "sha256": "abcd", "vocab_size": 32_000, "eod_id": 2},
        "append_eod": True,
        "dtype": "uint16",
        "json_key": "text",
        "documents": 3,
        "tokens": 40,
        "empty_documents": 1,
        "skipped": {"invalid_json": 2},
        "format": "megacpt token dataset 1",
    }
    manifest_path(tmp_path / "x").write_text(json.dumps(old))
    manifest = read_manifest(tmp_path / "x")
    assert (manifest.documents, manifest.tokens, manifest.eod_tokens, manifest.json_keys) == (3, 40, 2, ["text"])
    assert (manifest.filters, manifest.lengths, manifest.shard) == (Filters(skip_invalid=True), None, None)


def test_no_filters_gives_these_documents(tmp_path):
    merged = replace(MANIFEST, filters=None, shard=None)
    write_manifest(tmp_path / "x", merged)
    assert read_manifest(tmp_path / "x") == merged
