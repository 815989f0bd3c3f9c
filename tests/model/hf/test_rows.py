"""Row layouts: every row of a fused tensor is one row of one part, whatever interval is asked for."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megacpt.model.hf.rows import Layout, cut, grouped, places, stacked

Case = tuple[Layout, list[int]]


@st.composite
def layouts(draw: st.DrawFn) -> Case:
    """A layout and the rows of its parts."""
    if draw(st.booleans()):
        rows = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
        return stacked(rows), rows
    groups, head, queries = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    rows = [groups * queries * head, groups * head, groups * head]
    return grouped(rows, groups), rows


def parts_of(rows: list[int]) -> list[np.ndarray]:
    """Parts whose rows are all different numbers."""
    return [1000 * part + np.arange(count) for part, count in enumerate(rows)]


def fused(layout: Layout, parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([parts[span.part][span.start : span.stop] for span in layout])


@given(layouts(), st.data())
def test_a_cut_gives_the_rows_of_the_interval(case: Case, data: st.DataObject) -> None:
    layout, rows = case
    parts, total = parts_of(rows), sum(rows)
    start = data.draw(st.integers(0, total + 3))
    stop = data.draw(st.integers(start, total + 8))
    spans = cut(layout, start, stop)
    pieces = [parts[span.part][span.start : span.stop] for span in spans]
    found = np.concatenate(pieces) if pieces else np.empty(0, int)
    assert found.tolist() == fused(layout, parts)[start:stop].tolist()
    assert all(span.rows > 0 for span in spans)


@given(layouts())
def test_places_take_the_parts_out_again(case: Case) -> None:
    layout, rows = case
    parts = parts_of(rows)
    whole = fused(layout, parts)
    assert sorted(whole.tolist()) == sorted(np.concatenate(parts).tolist())
    for number, part in enumerate(parts):
        found = np.full_like(part, -1)
        for place in places(layout, number):
            found[place.part_start : place.part_start + place.stop - place.start] = whole[place.start : place.stop]
        assert found.tolist() == part.tolist()


def test_grouped_is_megatrons_order() -> None:
    layout = grouped([8, 4, 4], groups=2)
    assert [tuple(span) for span in layout] == [(0, 0, 4), (1, 0, 2), (2, 0, 2), (0, 4, 8), (1, 2, 4), (2, 2, 4)]
