import gzip
import json
import os
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder as MegatronBuilder
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, processors, trainers

from megacpt import __version__
from megacpt.data.text import documents, long_string
from megacpt.data.text.provenance import InputFile
from megacpt.data.tokens.encode import Encoding
from megacpt.data.tokens.indexed import IndexedDataset, bin_path, idx_path
from megacpt.data.tokens.manifest import TokenizerInfo, manifest_path, read_manifest
from megacpt.data.tokens.preprocess import Job, preprocess
from megacpt.data.tokens.tokenizer import load_tokenizer
from megacpt.errors import UserError
from megacpt.files import sha256_of
from tests.conftest import SHARED

TEXTS = ["the first text", "", "é \U0001f600\n\n", " ", "a longer text of some words, " * 40, "the end"] * 5


def write_tokenizer(folder: Path, bos: bool = False, extra: int = 0) -> Path:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<s>", "</s>", *(f"<extra_{i}>" for i in range(extra))]
    trainer = trainers.BpeTrainer(
        vocab_size=300 + extra, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    library.train_from_iterator(["some text of the first words"] * 5, trainer)
    if bos:
        library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write_rows(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "title": text[:5]}) + "\n" for text in texts))
    return path


def job(inputs, prefix, tokenizer, keys=("text",), append_eod=True, skip_invalid=False, **options) -> Job:
    kind = "SentencePieceTokenizer" if str(tokenizer).endswith(".model") else "HuggingFaceTokenizer"
    encoding = Encoding(tuple(keys), kind, str(tokenizer), append_eod, skip_invalid)
    return Job(tuple(map(str, inputs)), str(prefix), encoding, **options)


def as_megatron_writes(prefix: Path, ids: Iterable[list[int]], vocab_size: int, eod: int | None) -> None:
    """The rules of Megatron-LM's preprocess_data.py on ready ids, through megatron-core's own builder."""
    builder = MegatronBuilder(str(bin_path(prefix)), dtype=DType.optimal_dtype(vocab_size))
    for tokens in ids:
        document = list(tokens)
        lengths = [len(document)] if document else []
        if document and eod is not None:
            document.append(eod)
            lengths[-1] += 1
        builder.add_document(document, lengths)
    builder.finalize(str(idx_path(prefix)))


def same(one: Path | str, other: Path | str) -> bool:
    return all(path(one).read_bytes() == path(other).read_bytes() for path in (bin_path, idx_path))


@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("extra", [0, 65_300])
def test_bytes_are_those_of_megatrons_builder(tmp_path, append_eod, bos, extra):
    tokenizer = write_tokenizer(tmp_path, bos, extra)
    rows = write_rows(tmp_path / "a.jsonl", TEXTS)
    ((prefix, manifest),) = preprocess(job([rows], tmp_path / "out", tokenizer, append_eod=append_eod)).items()
    library = Library.from_file(str(tokenizer))
    ids = [library.encode(text).ids for text in TEXTS]
    size = library.get_vocab_size()
    as_megatron_writes(tmp_path / "theirs", ids, size, 1 if append_eod else None)
    assert prefix == str(tmp_path / "out_text_document")
    assert same(prefix, tmp_path / "theirs")
    assert manifest.dtype == ("int32" if extra else "uint16")
    assert manifest.empty_documents == (0 if bos else TEXTS.count(""))


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1).filter(any),
    append_eod=st.booleans(),
    block=st.integers(1, 500),
)
def test_any_texts_read_back(tmp_path_factory, texts, append_eod, block):
    folder = tmp_path_factory.mktemp("any")
    tokenizer = write_tokenizer(folder)
    rows = write_rows(folder / "a.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK_BYTES", block)
        ((prefix, manifest),) = preprocess(job([rows], folder / "out", tokenizer, append_eod=append_eod)).items()
    expected = [load_tokenizer("HuggingFaceTokenizer", tokenizer).encode(text).tolist() for text in texts]
    expected = [[*ids, 1] if ids and append_eod else ids for ids in expected]
    dataset = IndexedDataset(prefix)
    assert [dataset.read(i).tolist() for i in range(len(dataset))] == expected
    assert (manifest.documents, manifest.tokens) == (len(texts), sum(map(len, expected)))
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    theirs = MegatronDataset(prefix)
    assert [theirs[i].tolist() for i in range(len(theirs))] == [ids for ids in expected if ids]
    assert len(theirs.document_indices) == len(texts) + 1


def test_every_format_gives_the_same_bytes(tmp_path):
    import pyarrow
    import pyarrow.parquet

    tokenizer = write_tokenizer(tmp_path)
    rows = write_rows(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.read_bytes()))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(rows.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    prefixes = []
    for number, name in enumerate(["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"]):
        prefixes += preprocess(job([tmp_path / name], tmp_path / f"out{number}", tokenizer))
    assert len(prefixes) == 4
    assert all(same(prefixes[0], prefix) for prefix in prefixes[1:])


@pytest.mark.parametrize("packed", [True, False])
def test_of_very_long_documents_one_is_held_at_a_time(tmp_path, packed):
    tokenizer = write_tokenizer(tmp_path)
    line = json.dumps({"text": "some words of the text " * 800_000}).encode() + b"\n"
    assert len(line) > long_string.LONG
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    peaks = []
    for count in (1, 3):
        path.write_bytes(count * (gzip.compress(line, 1) if packed else line))
        tracemalloc.start()
        try:
            (made,) = preprocess(job([path], tmp_path / f"out{count}", tokenizer)).values()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert made.documents == count
    assert peaks[1] < peaks[0] + 0.3 * len(line)


def test_the_number_of_workers_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 200)
    tokenizer = write_tokenizer(tmp_path)
    rows = [write_rows(tmp_path / f"{name}.jsonl", TEXTS) for name in "ab"]
    with open(rows[0], "a") as handle:
        handle.write('{"no": "text"}\n' * 3)
    written = {}
    for workers in (1, 2, 3):
        made = job(rows, tmp_path / f"out{workers}", tokenizer, ["text", "title"], skip_invalid=True, workers=workers)
        written[workers] = preprocess(made)
    for workers in (2, 3):
        for one, other in zip(written[1], written[workers], strict=True):
            assert same(one, other)
            assert manifest_path(one).read_bytes() == manifest_path(other).read_bytes()
            assert written[1][one].skipped == {"missing_key": 3}


def test_the_first_bad_row_is_named_whatever_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 100)
    rows = write_rows(tmp_path / "a.jsonl", TEXTS)
    lines = rows.read_text().splitlines()
    lines[10] = lines[11] = lines[29] = "{}"
    rows.write_text("\n".join(lines))
    tokenizer = write_tokenizer(tmp_path)
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"a\.jsonl:11: has no key 'text'"):
            preprocess(job([rows], tmp_path / "out", tokenizer, workers=workers))
    assert list(tmp_path.glob("*out*")) == []


def test_the_manifest_says_what_the_dataset_was_made_from(tmp_path):
    tokenizer = write_tokenizer(tmp_path)
    rows = [write_rows(tmp_path / f"{name}.jsonl", TEXTS) for name in "ba"]
    (prefix,) = preprocess(job(rows, tmp_path / "out", tokenizer))
    manifest = read_manifest(prefix)
    assert manifest is not None
    assert manifest.inputs == [InputFile(path.name, path.stat().st_size, sha256_of(path)) for path in rows]
    size = Library.from_file(str(tokenizer)).get_vocab_size()
    assert manifest.tokenizer == TokenizerInfo("HuggingFaceTokenizer", sha256_of(tokenizer), size, 1)
    assert manifest.tokenizer_model == str(tokenizer.resolve())
    assert (manifest.megacpt_version, manifest.json_key, manifest.append_eod) == (__version__, "text", True)
    assert (manifest.documents, manifest.empty_documents) == (60, 10)
    assert manifest.tokens == IndexedDataset(prefix).tokens
    assert manifest.skipped == {}


def test_existing_outputs_are_kept_unless_told(tmp_path):
    tokenizer = write_tokenizer(tmp_path)
    rows = write_rows(tmp_path / "a.jsonl", TEXTS)
    other = write_rows(tmp_path / "b.jsonl", TEXTS[:4])
    (prefix,) = preprocess(job([rows], tmp_path / "out", tokenizer))
    before = bin_path(prefix).read_bytes()
    with pytest.raises(UserError, match=r"exists already; pass --overwrite"):
        preprocess(job([other], tmp_path / "out", tokenizer))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{')
    with pytest.raises(UserError, match=r"bad\.jsonl:2"):
        preprocess(job([tmp_path / "bad.jsonl"], tmp_path / "out", tokenizer, overwrite=True))
    assert bin_path(prefix).read_bytes() == before, "a failed run leaves the old dataset"
    preprocess(job([other], tmp_path / "out", tokenizer, overwrite=True))
    assert len(IndexedDataset(prefix)) == 4


def test_a_failure_at_the_very_end_leaves_nothing_finished(tmp_path):
    """The manifest cannot be written: a folder has its name."""
    tokenizer = write_tokenizer(tmp_path)
    rows = write_rows(tmp_path / "a.jsonl", TEXTS)
    manifest_path(tmp_path / "out_text_document").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        preprocess(job([rows], tmp_path / "out", tokenizer, overwrite=True))
    assert [path.name for path in tmp_path.glob("*out*")] == ["out_text_document.json"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "the corpus is empty"),
        ("\n\n", "the corpus is empty"),
        ('{"text": ""}\n' * 3, "no document has any text under 'text'"),
        ("{\n{\n", r"\(2 invalid_json skipped\)"),
    ],
)
def test_an_empty_corpus(tmp_path, rows, message):
    (tmp_path / "a.jsonl").write_text(rows)
    with pytest.raises(UserError, match=message):
        preprocess(job([tmp_path / "a.jsonl"], tmp_path / "out", write_tokenizer(tmp_path), skip_invalid=True))
    assert list(tmp_path.glob("*out*")) == []


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared test data are not beside this checkout")
@pytest.mark.parametrize("name", ["mistral_v1_32000.model", "smollm2_tokenizer.json.gz"])
def test_real_text_with_real_tokenizers(tmp_path, name):
    path = SHARED / "data" / "tokenizer" / name
    with gzip.open(SHARED / "data" / "medical" / "medquad.jsonl.gz", "rt") as handle:
        lines = [line for line, _ in zip(handle, range(400), strict=False)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    ((prefix, manifest),) = preprocess(job([tmp_path / "a.jsonl"], tmp_path / "out", path)).items()
    if name.endswith(".model"):
        import sentencepiece

        library = sentencepiece.SentencePieceProcessor(model_file=str(path))
        ids, size, eod = [library.encode(json.loads(line)["text"]) for line in lines], len(library), library.eos_id()
    else:
        library = Library.from_buffer(gzip.decompress(path.read_bytes()))
        ids = [library.encode(json.loads(line)["text"]).ids for line in lines]
        size, eod = library.get_vocab_size(), library.token_to_id("<|endoftext|>")
    as_megatron_writes(tmp_path / "theirs", ids, size, eod)
    assert same(prefix, tmp_path / "theirs")
    assert (manifest.documents, manifest.tokenizer.eod_id) == (400, eod)
    # Its arrays look into a map that closes with the dataset.
    read_by_megatron = MegatronDataset(prefix)
    assert np.array_equal(read_by_megatron[7], [*ids[7], eod])


def test_a_refused_run_leaves_the_work_of_an_earlier_one(tmp_path, monkeypatch):
    monkeypatch.setattr("megacpt.data.tokens.work.SECONDS_BETWEEN_NOTES", 0.0)
    monkeypatch.setattr(documents, "BLOCK_BYTES", 100)
    monkeypatch.setattr("megacpt.data.text.compression.CHUNK_BYTES", 100)
    tokenizer = write_tokenizer(tmp_path)
    good, bad = write_rows(tmp_path / "a.jsonl", TEXTS), write_rows(tmp_path / "b.jsonl", TEXTS)
    (prefix,) = preprocess(job([good], tmp_path / "out", tokenizer))
    with open(bad, "a") as handle:
        handle.write("{}\n")
    with pytest.raises(UserError, match=r"[1-9]\d* documents are kept in"):
        preprocess(job([bad], tmp_path / "out", tokenizer, overwrite=True))
    (work,) = tmp_path.glob(".out*")
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    with pytest.raises(UserError, match=r"exists already; pass --overwrite[^(]*$"):
        preprocess(job([good], tmp_path / "out", tokenizer))
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before
    assert len(IndexedDataset(prefix)) == 30


class Killed(BaseException):
    pass


def be_killed(*_) -> None:
    raise Killed


@pytest.mark.parametrize("killed_at", ["index", "manifest", "first bin", "second bin", "work folder"])
def test_a_run_that_ends_while_datasets_get_their_names_is_finished(tmp_path, monkeypatch, killed_at):
    """As a kill leaves it: nothing is tidied up."""
    tokenizer = write_tokenizer(tmp_path)
    rows = write_rows(tmp_path / "a.jsonl", TEXTS)
    keys = ["text", "title"]
    whole = list(preprocess(job([rows], tmp_path / "whole", tokenizer, keys)))
    bins = {"first bin": "out_text_document.bin", "second bin": "out_title_document.bin"}
    calls = {
        "index": "outputs.write_document_index",
        "manifest": "outputs.write_manifest",
        "work folder": "work.Work.remove",
    }
    real = os.replace

    def replace(old, new):
        if Path(new).name == bins[killed_at]:
            raise Killed
        real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr("megacpt.data.tokens.preprocess._give_up", lambda work, *_: work.leave())
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        if killed_at in bins:
            patch.setattr("megacpt.data.tokens.outputs.os.replace", replace)
        else:
            patch.setattr(f"megacpt.data.tokens.{calls[killed_at]}", be_killed)
        with pytest.raises(Killed):
            preprocess(job([rows], tmp_path / "out", tokenizer, keys))
    found = list(preprocess(job([rows], tmp_path / "out", tokenizer, keys)))
    for one, other in zip(whole, found, strict=True):
        assert same(one, other)
        assert manifest_path(one).read_bytes() == manifest_path(other).read_bytes()
    assert list(tmp_path.glob(".*")) == []
