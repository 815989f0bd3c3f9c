import gzip
import json
import pickle
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpt.data.text import documents, long_string
from megacpt.data.text.documents import Block, Source
from megacpt.data.text.filtering import iter_documents
from megacpt.data.text.inputs import find_inputs
from megacpt.data.text.long_string import LongString
from megacpt.data.text.provenance import Filters
from megacpt.data.text.rows import parse_block, texts_of
from megacpt.errors import UserError
from megacpt.files import sha256_of

TEXTS = ["plain", "", "two\nlines\r\n", "é \u2028 \U0001f600", "x" * 700_000, "  spaces  ", '"quoted" \\ \u0000'] * 3


def read_documents(paths, key, skipped=None):
    """(where, text) of every row; a counter counts bad rows instead of stopping at the first."""
    found = iter_documents(paths, [key], Filters(skip_invalid=skipped is not None), skipped)
    return ((where, text) for where, (text,) in found)


def as_jsonl(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def write(folder, name, texts):
    path = folder / name
    raw = as_jsonl(texts)
    if name.endswith(".gz"):
        half = len(raw) // 2
        path.write_bytes(gzip.compress(raw[:half]) + gzip.compress(raw[half:]))
    elif name.endswith(".zst"):
        half = len(raw) // 2
        path.write_bytes(zstandard.compress(raw[:half]) + zstandard.compress(raw[half:]))
    elif name.endswith(".parquet"):
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=4)
    else:
        path.write_bytes(raw)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "b.gz"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path, name, TEXTS)
    assert list(read_documents([path], "text")) == [(f"{path}:{i}", text) for i, text in enumerate(TEXTS, 1)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_source_records_its_file_and_accounts_for_its_bytes(tmp_path, name):
    path = write(tmp_path, name, TEXTS)
    source = Source(path)
    consumed = sum(block.consumed for block in source.blocks(["text"]))
    assert abs(consumed - path.stat().st_size) <= 8, "rows of a Parquet file are rounded"
    record = source.record()
    assert (record.name, record.bytes, record.sha256) == (name, path.stat().st_size, sha256_of(path))


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=15), data=st.data())
def test_rows_survive_any_cut_into_blocks(tmp_path_factory, texts, data):
    size = data.draw(st.integers(1, 200))
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    raw = as_jsonl(texts)
    path.write_bytes(raw.removesuffix(b"\n") if data.draw(st.booleans()) else raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK_BYTES", size)
        patch.setattr("megacpt.data.text.compression.CHUNK_BYTES", max(1, size // 3))
        assert [text for _, text in read_documents([path], "text")] == texts


def test_blank_lines_hold_no_row_but_count_as_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "a"}\r\n  \n{"text": "b"}\n\n')
    rows = list(read_documents([tmp_path / "a.jsonl"], "text"))
    assert [(where.rsplit(":", 1)[1], text) for where, text in rows] == [("2", "a"), ("4", "b")]


def test_what_json_takes_and_orjson_does_not(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a", "x": NaN}\n{"text": "b", "x": "\\ud800"}\n')
    assert [text for _, text in read_documents([tmp_path / "a.jsonl"], "text")] == ["a", "b"]


BAD_LINES = [
    (b"{", "invalid_json", r"invalid JSON \(.* at column \d+\)"),
    (b'{"text": "a"} {}', "invalid_json", r"Extra data at column 15"),
    (b"[1]", "invalid_json", "is not a JSON object but list"),
    (b"[" * 100_000, "invalid_json", "invalid JSON"),
    (b'{"text": "\xff"}', "invalid_utf8", "invalid UTF-8 at byte 11"),
    (b'{"text": "a\\udc00"}', "invalid_utf8", "no Unicode character at position 2"),
    (b'{"txt": "a"}', "missing_key", "has no key 'text' \\(it has txt\\)"),
    (b"{}", "missing_key", "has no key 'text'"),
    (b'{"text": 1}', "not_a_string", "not a string but int"),
    (b'{"text": null}', "not_a_string", "not a string but NoneType"),
    (b'{"text": ["a"]}', "not_a_string", "not a string but list"),
]


@pytest.mark.parametrize(("line", "kind", "message"), BAD_LINES)
def test_a_bad_row_is_named_or_counted(tmp_path, line, kind, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + line + b'\n{"text": "last"}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{message}.*; correct the row or pass --skip-invalid"):
        list(read_documents([path], "text"))
    skipped: Counter[str] = Counter()
    assert [text for _, text in read_documents([path], "text", skipped)] == ["first", "last"]
    assert skipped == {kind: 1}


def test_a_row_is_used_for_all_its_keys_or_for_none(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"q": "1", "a": "2"}\n{"q": "3"}\n{"q": "4", "a": "5"}\n')
    skipped: Counter[str] = Counter()
    (block,) = Source(tmp_path / "a.jsonl").blocks(["q", "a"])
    assert [texts for _, texts in parse_block(block, ["q", "a"], skipped)] == [["1", "2"], ["4", "5"]]
    assert skipped == {"missing_key": 1}


ODD_LINES = [
    *(
        b"",
        b" \t\r",
        b"3",
        b'"text"',
        b"[]",
        b'["text"]',
        b"null",
        b"{}",
        b'{"text": "a"}\r',
        b' {"title":"b","text":"a"}',
    ),
    *(
        b'{"text": "first", "title": "t", "text": "last"}',
        b'{"text": "a", "title": "t", "x": NaN}',
        b'{"text": "\xff"}',
    ),
    *(
        b'{"text": "\\ud800", "title": ""}',
        b'{"text": "a", "title": "t"}{',
        b'{"text": "\\ud83d\\ude00", "title": "\\u0000"}',
    ),
]
OBJECTS = st.dictionaries(st.sampled_from(["text", "title", "id"]), st.text() | st.integers() | st.none())
LINES = OBJECTS.map(lambda row: json.dumps(row, ensure_ascii=False).encode()) | st.sampled_from(ODD_LINES)


@settings(max_examples=300)
@given(
    lines=st.lists(LINES, max_size=5),
    keys=st.sampled_from([("text",), ("text", "title")]),
    long=st.sampled_from([4, long_string.LONG]),
)
def test_the_short_way_to_texts_is_the_careful_one(lines, keys, long):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_string, "LONG", long)
        compare_ways(lines, keys)


def compare_ways(lines, keys):
    block = Block("a.jsonl", 7, 0, b"\n".join(lines))
    ours, theirs = Counter(), Counter()
    rows = [texts for _, texts in parse_block(block, keys, theirs)]
    found = [list(map(str, texts)) for texts in texts_of(block, keys, ours)]
    assert found == [[texts[i] for texts in rows] for i in range(len(keys))]
    assert ours == theirs
    if theirs:
        with pytest.raises(UserError) as careful:
            list(parse_block(block, keys))
        with pytest.raises(UserError) as short:
            texts_of(block, keys)
        assert str(short.value) == str(careful.value)


@pytest.mark.parametrize("typed", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("long", [501, long_string.LONG])
def test_long_rows_of_parquet_are_not_held_together(tmp_path, monkeypatch, typed, long):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(long_string, "LONG", long)
    monkeypatch.setattr(long_string, "PIECE", 100)
    texts = [f"{number} " + "é" * size for number, size in enumerate([1] * 900 + [3000] * 9 + [400] * 30 + [1] * 9)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(texts, pa.string()).cast(typed), "n": range(len(texts))}), path)
    blocks = list(Source(path).blocks(["text", "n"]))
    found = [text for block in blocks for text in block.columns["text"]]
    assert list(map(str, found)) == texts
    for text in (text for text in found if isinstance(text, LongString)):
        assert (len(text), text.text_bytes) == (len(str(text)), len(str(text).encode()))
        assert text.text_bytes >= long
        assert str(pickle.loads(pickle.dumps(text))) == str(text)
    assert any(isinstance(text, LongString) for text in found) == (long < 1000 and not pa.types.is_dictionary(typed))
    assert [n for block in blocks for n in block.columns["n"]] == list(range(len(texts)))
    assert sum(block.consumed for block in blocks) <= path.stat().st_size
    if typed != pa.dictionary(pa.int32(), pa.string()):
        assert all(len("".join(map(str, block.columns["text"][:-1])).encode()) < 1000 for block in blocks)
        assert len(blocks) < 60
    for block in blocks:
        rest = [str(text) for after in Source(path).blocks(["text"], block.end) for text in after.columns["text"]]
        assert rest == texts[block.end :]


@pytest.mark.parametrize("long", [2, long_string.LONG])
def test_bad_rows_of_parquet(tmp_path, monkeypatch, long):
    monkeypatch.setattr(long_string, "LONG", long)
    path = tmp_path / "a.parquet"
    raw = pa.array([b"good", b"\xff", None, b"last"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    pq.write_table(pa.table({"text": text, "n": [1, 2, 3, 4]}), path)
    with pytest.raises(UserError, match=r"a\.parquet:2: invalid UTF-8"):
        list(read_documents([path], "text"))
    skipped: Counter[str] = Counter()
    assert [text for _, text in read_documents([path], "text", skipped)] == ["good", "last"]
    assert skipped == {"invalid_utf8": 1, "not_a_string": 1}
    with pytest.raises(UserError, match=r"a\.parquet:1: the value of 'n' is not a string but int"):
        list(read_documents([path], "n"))
    with pytest.raises(UserError, match=r"a\.parquet:1: has no key 'body' \(it has n, text\)"):
        list(read_documents([path], "body"))
    skipped.clear()
    assert list(read_documents([path], "body", skipped)) == []
    assert skipped == {"missing_key": 4}


@pytest.mark.parametrize(
    ("place", "packing", "summed"), [(0, "none", False), (0.5, "snappy", False), (0.5, "zstd", True)]
)
def test_a_damaged_page_of_parquet_is_named_by_the_rows_before_it(tmp_path, place, packing, summed):
    path = tmp_path / "a.parquet"
    texts = [f"document {i} " * 9 for i in range(4_000)]
    options = {"use_dictionary": False, "compression": packing, "write_page_checksum": summed}
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1_000, **options)
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    whole = path.read_bytes()
    damaged = column.data_page_offset + int(place * column.total_compressed_size)
    path.write_bytes(whole[:damaged] + b"\xd5" * 40 + whole[damaged + 40 :])
    with pytest.raises(UserError) as error:
        list(read_documents([path], "text"))
    words = str(error.value)
    assert words.startswith(f"{path}: damaged Parquet after row ")
    assert words.endswith("; fetch or write it again")
    assert "\n" not in words


def test_a_column_that_is_there_twice(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(UserError, match=r"a\.parquet: has more than one column 'text'; write it with one"):
        list(read_documents([path], "text"))


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)])
def test_truncated_at_every_byte(tmp_path, name, pack):
    whole = pack(as_jsonl(["first", "second", "third" * 40]))
    for size in range(len(whole)):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"{name}: the .* file is (truncated|damaged)"):
            list(read_documents([tmp_path / name], "text"))


def test_truncation_names_the_last_line(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    lines = as_jsonl([f"document {i}" for i in range(5000)])
    path.write_bytes(gzip.compress(lines)[:-40])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: the gzip file is truncated after line 4,9\d\d; fetch"):
        list(read_documents([path], "text"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_not_of_the_suffixs_format(tmp_path, name):
    (tmp_path / name).write_bytes(as_jsonl(["a"]))
    with pytest.raises(UserError, match=rf"{name}: .*damaged.* at its start"):
        list(read_documents([tmp_path / name], "text"))


def test_links_to_folders_are_followed(tmp_path):
    for name in ["elsewhere/b.jsonl", "elsewhere/.hidden/c.jsonl", "corpus/a.jsonl"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "corpus" / "more").symlink_to(tmp_path / "elsewhere")
    found = find_inputs([str(tmp_path / "corpus")])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["corpus/a.jsonl", "corpus/more/b.jsonl"]
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "corpus")
    with pytest.raises(UserError, match=r"corpus/more/back: is by a link the same folder as .*corpus; give each"):
        find_inputs([str(tmp_path / "corpus")])


@pytest.mark.parametrize("pattern", ["corpus", "corpus/*.jsonl"])
def test_a_link_to_nothing_is_named(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").touch()
    (tmp_path / "corpus" / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"corpus/b\.jsonl: is a link to nothing; remove it"):
        find_inputs([pattern])


def test_inputs_keep_the_given_order_and_sort_folders_and_globs(tmp_path):
    for name in [
        "b.jsonl",
        "a.jsonl.gz",
        "sub/c.parquet",
        "README.md",
        ".hidden.jsonl",
        "z.json",
        "10.jsonl",
        "9.jsonl",
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(*patterns):
        return [str(path.relative_to(tmp_path)) for path in find_inputs([str(tmp_path / p) for p in patterns])]

    assert names(".") == ["10.jsonl", "9.jsonl", "a.jsonl.gz", "b.jsonl", "sub/c.parquet", "z.json"]
    assert names("z.json", "[ab].jsonl*", "sub") == ["z.json", "a.jsonl.gz", "b.jsonl", "sub/c.parquet"]


def test_a_datasets_manifest_is_not_taken_for_text(tmp_path):
    for name in ["a.jsonl", "out.json", "out.idx", "out.bin"]:
        (tmp_path / name).touch()
    assert [path.name for path in find_inputs([str(tmp_path)])] == ["a.jsonl"]
    assert [path.name for path in find_inputs([str(tmp_path / "*.json*")])] == ["a.jsonl"]


def test_records_of_models_scores_and_subsets_are_not_taken_for_text(tmp_path):
    for name in ["a.jsonl", "model", "scores.npy", "books", "odd"]:
        (tmp_path / name).touch()
    for name in ["model", "scores.npy", "lonely"]:
        (tmp_path / f"{name}.json").write_text('{"documents": 1,\n"format": "megacpt scores 1"}\n')
    (tmp_path / "books.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "odd.json").write_text('["text"]\n')
    expected = ["a.jsonl", "books.json", "lonely.json", "odd.json"]
    assert [path.name for path in find_inputs([str(tmp_path)])] == expected
    assert [path.name for path in find_inputs([str(tmp_path / "*.json*")])] == expected
    assert find_inputs([str(tmp_path / "model.json")]) == [tmp_path / "model.json"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["no.jsonl"], "no file matches"),
        (["*.parquet"], "no file matches"),
        (["empty"], "this folder holds no"),
        (["a.txt"], "unknown kind of input"),
        (["*"], "unknown kind of input"),
        (["a.jsonl", "*.jsonl"], "given twice"),
        (["a" * 300], r"a: cannot be read \(File name too long\)"),
    ],
)
def test_inputs_that_cannot_be(tmp_path, monkeypatch, patterns, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "a.txt").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_inputs(patterns)
