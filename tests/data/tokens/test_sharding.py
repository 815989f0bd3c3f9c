"""One corpus of mixed formats and two keys: the same bytes from one process, workers, Ray nodes and merged shards."""

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers

from megacpt.data.text import documents, parquet
from megacpt.data.text.documents import Source
from megacpt.data.text.rows import parse_block
from megacpt.data.tokens.encode import Encoding, encode_block
from megacpt.data.tokens.indexed import bin_path, idx_path
from megacpt.data.tokens.manifest import manifest_path, read_manifest
from megacpt.data.tokens.merge import merge
from megacpt.data.tokens.outputs import digests_path
from megacpt.data.tokens.preprocess import Job, preprocess
from megacpt.data.tokens.shards import Shard, cuts, parse_shard, share
from megacpt.data.tokens.workers import encode_with
from megacpt.errors import UserError

KEYS = ("text", "title")
NAMES = ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.jsonl")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 700)
    monkeypatch.setattr(parquet, "ROWS", 16)
    monkeypatch.setattr("megacpt.data.text.compression.CHUNK_BYTES", 300)


def rows_of(name: str) -> list[dict[str, str]]:
    """Some texts are in all files, some twice in one."""
    texts = [f"{name} document {i % 37}" if i % 5 else f"a common text {i % 11} é" * (i % 4) for i in range(120)]
    return [{"title": text[:7], "text": text} for text in texts]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=50)
    else:
        # Packed hardly at all, so that a cut can lie inside.
        path.write_bytes(
            {".gz": lambda: gzip.compress(raw, 0), ".zst": lambda: stored(raw)}.get(path.suffix, lambda: raw)()
        )
    return path


def stored(raw: bytes) -> bytes:
    return b"".join(zstandard.compress(raw[i : i + 400], -100) for i in range(0, len(raw), 400))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("corpus")
    return [write(folder / name, rows_of(name)) for name in NAMES]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        ["a common text of a document"] * 5,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet),
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    library.save(str(path))
    return path


def job(inputs, prefix, tokenizer, dedup="exact", min_chars=3, **options) -> Job:
    encoding = Encoding(KEYS, "HuggingFaceTokenizer", str(tokenizer), True, False, min_chars=min_chars, dedup=dedup)
    return Job(tuple(map(str, inputs)), str(prefix), encoding, **options)


def assert_same(one: str, other: str) -> None:
    for path in (bin_path, idx_path, manifest_path):
        assert path(one).read_bytes() == path(other).read_bytes(), path(other)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, corpus, tokenizer) -> dict[str, list[str]]:
    """Prefixes of one run in one process, with deduplication and without."""
    folder = tmp_path_factory.mktemp("one")
    return {dedup: list(preprocess(job(corpus, folder / dedup, tokenizer, dedup))) for dedup in ("none", "exact")}


def test_duplicates_and_short_texts_are_counted(reference):
    for number, dedup in enumerate(("none", "exact")):
        manifest = read_manifest(reference[dedup][0])
        kept = [text for name in NAMES for row in rows_of(name) if len(text := row["text"]) >= 3]
        expected = dict.fromkeys(kept) if number else kept
        assert manifest.documents == len(expected)
        assert manifest.too_short == 120 * len(NAMES) - len(kept)
        assert manifest.duplicates == len(kept) - len(expected)
        assert manifest.text_bytes == sum(len(text.encode()) for text in expected)


def test_four_workers(tmp_path, corpus, tokenizer, reference):
    found = preprocess(job(corpus, tmp_path / "out", tokenizer, workers=4))
    for one, other in zip(reference["exact"], found, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("dedup", ["none", "exact"])
@pytest.mark.parametrize("count", [2, 3, 7, 40])
def test_merged_shards(tmp_path, corpus, tokenizer, reference, dedup, count):
    found = [
        list(preprocess(job(corpus, tmp_path / "out", tokenizer, dedup, shard=Shard(index, count))))
        for index in range(count)
    ]
    assert found[1][0] == str(tmp_path / f"out_text_document.shard-00001-of-{count:05d}")
    assert digests_path(found[0][1]).exists() == (dedup == "exact")
    for key, one in enumerate(reference[dedup]):
        merge([prefixes[key] for prefixes in found], str(tmp_path / f"merged{key}"))
        assert_same(one, str(tmp_path / f"merged{key}"))


@pytest.mark.parametrize("shard", [Shard(0, 1), Shard(1, 3)])
def test_a_run_that_fails_at_every_other_block_goes_on_to_the_same_bytes(
    tmp_path, corpus, tokenizer, monkeypatch, shard
):
    whole = list(preprocess(job(corpus, tmp_path / "whole", tokenizer, shard=shard)))
    monkeypatch.setattr("megacpt.data.tokens.work.SECONDS_BETWEEN_NOTES", 0.0)

    def faulty(encoding, tokenizer):
        def encoded(blocks):
            for number, block in enumerate(blocks):
                if number == 2:
                    raise UserError("an error")
                yield encode_block(block, encoding, tokenizer)

        return encode_with(encoded)

    monkeypatch.setattr("megacpt.data.tokens.preprocess.encode_here", faulty)
    failures = 0
    while not (found := _finished(job(corpus, tmp_path / "out", tokenizer, shard=shard))):
        failures += 1
    assert failures > 5
    for one, other in zip(whole, found, strict=True):
        assert_same(one, other)
    assert list(tmp_path.glob(".*")) == []


def _finished(started: Job) -> list[str]:
    """The prefixes that a run wrote; none if it failed and kept what it had done."""
    try:
        return list(preprocess(started))
    except UserError as error:
        if "documents are kept in" not in str(error):
            raise
    return []


@pytest.mark.slow
def test_two_ray_nodes(tmp_path, corpus, tokenizer, reference, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed (the extra `ray`)")
    from ray.cluster_utils import Cluster

    monkeypatch.setattr("megacpt.data.tokens.ray_cluster.TASK_BYTES", 2000)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        found = preprocess(job(corpus, tmp_path / "out", tokenizer, engine="ray"))
        for one, other in zip(reference["exact"], found, strict=True):
            assert_same(one, other)
        (tmp_path / "bad.jsonl").write_text('{"text": "a", "title": "b"}\n{}\n')
        with pytest.raises(UserError, match=r"^[^\n]*bad\.jsonl:2: has no key 'text'[^\n]*$"):
            preprocess(job([tmp_path / "bad.jsonl"], tmp_path / "bad", tokenizer, engine="ray"))
    finally:
        cluster.shutdown()


def test_no_ray_cluster_answers(tmp_path, corpus, tokenizer, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed (the extra `ray`)")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match=r"no cluster answers at RAY_ADDRESS=127\.0\.0\.1:1"):
        preprocess(job(corpus, tmp_path / "out", tokenizer, engine="ray"))
    assert list(tmp_path.iterdir()) == []


@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=12), count=st.integers(1, 20))
def test_cuts_divide_everything_about_equally(sizes, count):
    found = cuts(sizes, count)
    assert found[0] == (0, 0)
    assert found[-1] == (len(sizes), 0)
    assert found == sorted(found)
    for file, byte in found[:-1]:
        assert byte == 0 or byte < sizes[file]
    total = sum(sizes)
    at = [sum(sizes[:file]) + byte for file, byte in found]
    assert all(end - start <= 1.5 * total / count + 1 for start, end in pairwise(at))


@pytest.mark.parametrize("count", [1, 2, 5, 60])
def test_parts_of_a_file_share_no_row_and_lack_none(tmp_path, count):
    rows = [{"title": str(i), "text": f"text {i} " * (i % 9)} for i in range(100)]
    for name in NAMES[:4]:
        path = write(tmp_path / name, rows)
        found = []
        for index in range(count):
            _, sources = share([path], Shard(index, count))
            for source in sources:
                found += [texts[1] for block in source.blocks(KEYS) for _, texts in parse_block(block, KEYS)]
        assert found == [row["title"] for row in rows], name


def test_many_files_are_not_cut(tmp_path):
    paths = [tmp_path / f"{i}.jsonl.gz" for i in range(20)]
    for path in paths:
        path.write_bytes(b"x" * 100)
    whole = [source for index in range(4) for source in share(paths, Shard(index, 4))[1]]
    assert [(source.path, source.begin, source.end) for source in whole] == [(path, 0, None) for path in paths]


def test_a_bad_row_in_the_middle_of_a_plain_file_is_found(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"title": "", "text": f"row {i}"} for i in range(100)])
    lines = path.read_bytes().splitlines(keepends=True)
    lines[80] = b"{}\n"
    path.write_bytes(b"".join(lines))
    (source,) = share([path], Shard(1, 2))[1]
    with pytest.raises(UserError) as error:
        [list(parse_block(block, KEYS)) for block in source.blocks(KEYS)]
    words = str(error.value)
    byte = int(words.split("from byte ")[1].split(")")[0].replace(",", ""))
    line = int(words.split("):")[1].split(":")[0])
    assert path.read_bytes()[byte:].splitlines()[line - 1] == b"{}"


@pytest.mark.parametrize("text", ["8/8", "1", "a/b", "-1/8", "1/0", "1/2/3"])
def test_what_is_no_shard(text):
    with pytest.raises(UserError, match=r"give I/N, with I from 0 to N - 1"):
        parse_shard(text)
    with pytest.raises(UserError, match=r"^--shard 0/100000: there are at most 99,999 shards$"):
        parse_shard("0/100000")


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"title": "", "text": "row"}] * 100)
    blocks = Source(path).blocks(KEYS)
    next(blocks)
    write(path, [{"title": "", "text": "row"}] * 101)
    with pytest.raises(UserError, match=r"a\.jsonl: was changed while it was read"):
        list(blocks)
