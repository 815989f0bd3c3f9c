from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.mixture.draw import Draw

SIZES, PARTS, POSITIONS = st.integers(1, 12), st.integers(1, 30), st.integers(0, 40)
REDRAWS = st.sampled_from(["each_pass", "once", "continue"])


def drawn(draw: Draw, passes: int) -> list[list[tuple[int, int]]]:
    assert draw.per_pass is not None
    part = draw.per_pass
    return [[draw.locate(p * part + i) for i in range(part)] for p in range(passes)]


@given(SIZES, PARTS, POSITIONS)
def test_each_pass_draws_anew_and_takes_no_sample_twice(size: int, per_pass: int, position: int):
    passes = drawn(Draw(size, position, per_pass, "each_pass"), 4)
    seen = [place for taken in passes for place in taken]
    assert len(set(seen)) == len(seen)
    assert min(seen) >= (-(-position // size), 0)
    for taken in passes:
        # Laps come whole, one after the other, but for the last.
        assert [row for _, row in taken] == [i % size for i in range(per_pass)]


@given(SIZES, PARTS, POSITIONS)
def test_once_takes_the_same_samples_in_another_order(size: int, per_pass: int, position: int):
    passes = drawn(Draw(size, position, per_pass, "once", key=7), 4)
    assert [row for _, row in passes[0]] == [i % size for i in range(per_pass)]
    assert all(sorted(taken) == sorted(passes[0]) for taken in passes)
    if per_pass > 12:
        assert len({tuple(taken) for taken in passes}) == 4


@given(SIZES, PARTS, PARTS, POSITIONS)
def test_once_keeps_its_samples_where_its_share_changes(size: int, before: int, after: int, position: int):
    old = Draw(size, position, before, "once", key=7)
    new = Draw(size, old.position_after(before), after, "once", key=8, fixed=old.fixed_after(before))
    (kept,), passes = drawn(old, 1), drawn(new, 4)
    shared = min(before, after)
    for taken in passes:
        assert len(set(taken)) == after
        assert set(kept[:shared]) <= set(taken)
        assert after > before or set(taken) <= set(kept)
    if min(before, after) > 12:
        assert kept[:shared] not in [taken[:shared] for taken in passes]
    later = Draw(size, new.position_after(after), 1, "each_pass")
    assert later.locate(0) not in {*kept, *passes[0]}


@given(SIZES, PARTS, POSITIONS)
def test_continue_leaves_nothing_out_and_repeats_nothing_early(size: int, per_pass: int, position: int):
    passes = drawn(Draw(size, position, per_pass, "continue"), 3)
    seen = [number * size + row for taken in passes for number, row in taken]
    assert seen == list(range(position, position + 3 * per_pass))


@given(SIZES, PARTS, POSITIONS, REDRAWS, st.data())
def test_runs_are_the_samples(size: int, per_pass: int, position: int, redraw: str, data: st.DataObject):
    draw = Draw(size, position, per_pass, redraw, key=3, fixed=data.draw(st.sampled_from([None, 1])))
    lower = data.draw(st.integers(0, 3 * per_pass))
    upper = data.draw(st.integers(lower, 4 * per_pass))
    expected = [draw.locate(index) for index in range(lower, upper)]
    runs = [(number, row) for number, first, end in draw.runs(lower, upper) for row in range(first, end)]
    assert sorted(runs) == sorted(expected)


@given(SIZES, PARTS, POSITIONS, REDRAWS, REDRAWS, st.integers(0, 90))
def test_who_takes_over_begins_with_what_was_not_begun(
    size: int, per_pass: int, position: int, before: str, after: str, count: int
):
    old = Draw(size, position, per_pass, before, key=3)
    new = Draw(size, old.position_after(count), per_pass, after, key=4)
    seen = {old.locate(index) for index in range(count)}
    assert not seen & {new.locate(index) for index in range(per_pass)}
    if before == "continue" == after:
        assert new.locate(0) == old.locate(count)
