import json
from contextlib import contextmanager

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megacpt.data.text import long_string
from megacpt.data.text.long_string import LongString, loads


@contextmanager
def small(long, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_string, "LONG", long)
        patch.setattr(long_string, "PIECE", piece)
        yield


def outcome(parse, line):
    try:
        return parse(line)
    except ValueError:
        return ValueError


def plain(value):
    """With every LongString written out, once it is seen to know itself."""
    if not isinstance(value, dict):
        return value
    for text in value.values():
        if isinstance(text, LongString):
            assert (len(text), text.text_bytes) == (len(str(text)), len(str(text).encode()))
    return {key: str(text) if isinstance(text, LongString) else text for key, text in value.items()}


WORDS = st.lists(
    st.sampled_from(["word", " ", "\n", '"', "\\", "é", "本", "\U0001f600", "\u0000", "abcdefghijklmnop"])
    | st.text(max_size=3),
    max_size=20,
).map("".join)
OBJECTS = st.dictionaries(WORDS | st.just("text"), WORDS | st.integers() | st.none(), max_size=3)
PARTS = [
    b"\\ud83d\\ude00",
    b"\\ud83d",
    b"\\ude00",
    b"\\u00ea",
    b"\\n",
    b"\\\\",
    b'\\"',
    b"\\",
    b"a",
    b" ",
    b"b c",
    b"\\u12",
]
PARTS += ["é".encode(), "本".encode(), b"\xe6", b"\x80", b"\n", b"0123456789abcd", b"\\x"]
ESCAPED = st.lists(
    st.sampled_from(PARTS),
    max_size=12,
).map(lambda parts: b'{"text": "' + b"".join(parts) + b'", "x": 1}')


@settings(max_examples=400)
@given(
    line=st.builds(lambda row, ascii: json.dumps(row, ensure_ascii=ascii).encode(), OBJECTS, st.booleans()) | ESCAPED,
    long=st.integers(0, 20),
    piece=st.integers(1, 30),
)
@example(b'{"a": ["aaaaaaaaaa"], "aaaaaaaaaa": "b"}', 3, 1)
@example(b'{"a": "aaaa", "a": "bbbb"}', 3, 1)
@example(b'"aaaaaaaaaaaa"', 3, 1)
@example(b'{"a": "aaaaaaaaaaaa', 3, 1)
def test_a_line_means_what_it_means_to_orjson(line, long, piece):
    expected = outcome(orjson.loads, line)
    with small(long, piece):
        found = outcome(loads, line)
        if isinstance(expected, dict) and isinstance(found, dict):
            direct = {key: text for key, text in expected.items() if isinstance(text, str | int | None)}
            found = plain(found)
            assert {key: text for key, text in found.items() if key in direct} == direct
            assert len(found) == len(expected)
        elif isinstance(expected, str):
            assert isinstance(found, str)
        else:
            assert found == expected


def test_pieces_are_small_whatever_the_script():
    with small(1000, 100):
        for text in ("word " * 1000, "本" * 1000, "ACGT" * 1000, "a\n" * 1000, "\U0001f600" * 1000):
            for escaped in (True, False):
                found = loads(json.dumps({"text": text}, ensure_ascii=escaped).encode())["text"]
                pieces = list(found.pieces())
                assert "".join(pieces) == text
                assert max(map(len, pieces)) <= 112
