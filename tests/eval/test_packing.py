"""Packing: every sequence is a path from a first token, what is shared is stored once, and masks show ancestors."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megacpt.eval.packing import Packed, pack
from megacpt.eval.scoring import plan_calls

SEQUENCES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=20)


def check(packed: Packed, sequences: list[list[int]]) -> None:
    for sequence, number, path in zip(sequences, packed.row_of, packed.places, strict=True):
        row = packed.rows[number]
        assert row.tokens[path].tolist() == sequence
        assert row.depths[path].tolist() == list(range(len(sequence)))
        assert row.parents[path].tolist() == [-1, *path[:-1]]


@given(SEQUENCES, st.integers(1, 40))
def test_every_sequence_is_a_path(sequences: list[list[int]], row_tokens: int) -> None:
    packed = pack(sequences, row_tokens)
    check(packed, sequences)
    assert sorted(map(len, packed.rows), reverse=True) == list(map(len, packed.rows))
    assert all(len(row) <= max(row_tokens, *map(len, sequences)) for row in packed.rows)
    assert sum(map(len, packed.rows)) <= sum(map(len, {tuple(s): s for s in sequences}.values()))


@given(SEQUENCES)
def test_a_token_sees_its_own_sequence_and_nothing_else(sequences: list[list[int]]) -> None:
    packed = pack(sequences, 100)
    for sequence, number, path in zip(sequences, packed.row_of, packed.places, strict=True):
        row = packed.rows[number]
        hidden = row.hidden(len(row) + 2)
        for depth in range(len(sequence)):
            assert np.flatnonzero(~hidden[path[depth]]).tolist() == path[: depth + 1].tolist()
        assert np.flatnonzero(~hidden[-1]).tolist() == [len(row) + 1]


def test_what_begins_alike_is_stored_once() -> None:
    context = list(range(10))
    sequences = [[*context, 1, 2], [*context, 1, 3], [*context, 4], context, [*context, 1, 2]]
    packed = pack(sequences, 100)
    check(packed, sequences)
    assert [len(row) for row in packed.rows] == [14]
    assert not packed.rows[0].is_plain
    assert pack([context, context], 100).rows[0].is_plain


def test_little_in_common_is_no_reason_to_share() -> None:
    assert len(pack([[1, *range(20)], [1, *range(50, 70)]], 100).rows) == 2


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 120),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3]),
)
def test_calls_hold_every_row_once(lengths: list[int], batch_tokens: int, stages: int, replicas: int) -> None:
    lengths.sort(reverse=True)
    calls = plan_calls(lengths, batch_tokens, stages, replicas)
    found = [number for call in calls for replica in call for batch in replica for number in batch]
    assert sorted(found) == list(range(len(lengths)))
    for call in calls:
        counts = {len(replica) for replica in call}
        assert len(call) == replicas
        assert len(counts) == 1
        assert counts.pop() % stages == 0
        for replica in call:
            for batch in replica:
                assert len(batch) <= 1 or len(batch) * lengths[batch[0]] <= batch_tokens
