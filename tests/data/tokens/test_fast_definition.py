import orjson
import pytest

from megacpt.data.tokens import fast_definition


def test_merges_become_the_pairs_they_stand_for_whatever_is_escaped_in_them() -> None:
    pairs = [
        ["a", "b"],
        ["()", '",'],
        ['"', '","'],
        ["\\", '"'],
        ['\\"', ","],
        [",", '"'],
        ["\n\\", '\\",'],
        ["é", "本"],
    ]

    found = fast_definition._paired(orjson.dumps([" ".join(pair) for pair in pairs]))

    assert orjson.loads(found) == pairs


@pytest.mark.parametrize("merges", [[], [["a b", "c"]]])
def test_merges_that_are_pairs_already_or_none_stay(merges: list[list[str]]) -> None:
    assert orjson.loads(fast_definition._paired(orjson.dumps(merges))) == merges


@pytest.mark.parametrize("kind", [1, 2, 3, 6])
@pytest.mark.parametrize("text", ["a", "▁the", "x" * 127, "x" * 128, "é" * 300])
def test_a_piece_is_read_alike_by_the_short_way_and_the_long_one(text: str, kind: int) -> None:
    content = text.encode()
    size = bytes([len(content)]) if len(content) < 128 else bytes([len(content) & 127 | 128, len(content) >> 7])
    message = (
        b"\x0a"
        + size
        + content
        + b"\x15"
        + fast_definition.SCORE.pack(-2.5)
        + (bytes([0x18, kind]) if kind > 1 else b"")
    )

    assert fast_definition._piece(message) == (text, -2.5, kind)
    assert (fast_definition._usual_piece(message) or fast_definition._piece(message)) == (text, -2.5, kind)
    assert (fast_definition._usual_piece(message) is not None) == (len(content) < 128)
