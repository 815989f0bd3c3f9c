import json

import pytest

from megacpt.data.manifest import InputFile, Manifest, TokenizerInfo, manifest_path, read_manifest, write_manifest
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
