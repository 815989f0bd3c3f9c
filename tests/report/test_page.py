"""The page as text: that it is well-formed, whole and asks for nothing. tests/tools/test_report.py opens it."""

import re
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from megacpt.report.arms import make_arms
from megacpt.report.chart import Finding, HeatMap, LineChart, Series
from megacpt.report.heat import draw_heat_map, on_one_scale, value_range
from megacpt.report.page import make_page
from megacpt.report.palette import SEQUENTIAL, shade
from megacpt.report.reading import read_run
from megacpt.report.run import RunData, Suite
from megacpt.report.svg import cut, draw_lines, tips, without_idle_zeros
from megacpt.report.tables import gap_table, suite_mean, suite_table
from megacpt.report.words import value_text
from tests.report.runs import rows_of, write_run

VOID = {"meta", "link", "input", "br", "hr", "img"}


class Balanced(HTMLParser):
    """Counts tags that do not close in order, and collects what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return read_run(write_run(tmp_path_factory.mktemp("runs") / "full", rows_of(missing="medqa_4options")), "full")


def page(*runs: RunData, **groups: list[RunData]) -> str:
    return make_page("A <title>", make_arms(runs, groups), datetime(2026, 1, 2, 3, 4))


def check(text: str) -> None:
    parser = Balanced()
    parser.feed(text)
    assert parser.wrong == []
    assert parser.open == []
    assert parser.links == ["data:,"]
    assert "http" not in re.sub(r'http-equiv="', "", text)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
        assert "nan" not in re.sub(r"aria-label=\"[^\"]*\"", "", svg)


def test_the_page_is_whole(run: RunData) -> None:
    text = page(run)
    check(text)
    assert "A &lt;title&gt;" in text
    assert "General next-token accuracy fell by" in text
    for section in (
        "The stability gap",
        "The gap\u2019s numbers",
        "medical-table1",
        "Training",
        "Weights",
        "provenance",
    ):
        assert section in text
    for legend in ("tokens trained on", "nats per token", "fraction right", "step 0", "tokens per second"):
        assert legend in text


def test_many_runs_and_groups(run: RunData, tmp_path: Path) -> None:
    others = [read_run(write_run(tmp_path / f"r{n}", rows_of(seed=n), seed=n), f"r{n}") for n in (2, 3, 4, 5, 6)]
    check(page(run, *others))
    text = page(run, *others, a=[run, others[0]], b=others[1:3])
    check(text)
    assert "a against b" in text
    assert "mean of 2" in text


def test_a_run_with_hardly_anything(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0, "consumed_tokens": 0, "validation": "<b>", "loss": 5}\n')
    text = page(read_run(tmp_path, "x"))
    check(text)
    assert "not evaluated since" in text
    (tmp_path / "metrics.jsonl").write_text(
        '{"iteration": 3, "consumed_tokens": 9, "guard": "g", "drop": 1, "max_drop": 1, "action": "warn"}\n'
    )
    check(page(read_run(tmp_path, "x")))


def test_a_suite_that_lacks_a_task_has_no_mean(run: RunData) -> None:
    table = suite_table(make_arms([run], {}), "medical-table1")
    assert table.columns == ("method", "tokens", "pubmedqa", "medmcqa", "medqa_4options", "mmlu_medical", "average")
    assert [row[-1].text for row in table.rows] == ["withheld", "withheld"]
    assert table.rows[0][-1].small == "no medqa_4options"


def test_means_are_recomputed() -> None:
    whole = Suite("s", 0, 0.0, {"a": 0.256, "b": 0.684, "c": 0.254, "d": 0.254}, ())
    assert suite_mean(whole) == pytest.approx(0.362)
    assert suite_mean(Suite("s", 0, 0.0, {"a": 0.2}, ("b",))) is None
    assert suite_mean(Suite("s", 0, 0.0, {"a": 0.2, "b": None}, ())) is None
    assert suite_mean(Suite("s", 0, 0.0, {}, ())) is None


def test_the_numbers_of_the_gap_are_in_the_table(run: RunData) -> None:
    arms = make_arms([run], {})
    row = next(row for row in gap_table(arms).rows if row[0].text == "General next-token accuracy")
    metric = run.metric(("set", "general", "accuracy"))
    assert metric is not None
    found = metric.gap
    assert found is not None
    assert found.start is not None
    assert row[2].text == value_text(found.start.value)
    assert (row[4].text, row[4].small) == (
        value_text(found.depth or 0.0),
        "[0.054, 0.062]",
    )
    assert "epoch" in row[7].small


def test_holes_cut_a_line_and_a_lone_point_is_seen() -> None:
    x, y = np.arange(6.0), np.array([1, 2, np.nan, 3, np.nan, 4])
    chart = LineChart("t", (Finding("f"),), "y", (Series(x, y, 0, "s"),), value_text)
    drawn = draw_lines(chart, log=False)
    assert drawn.count('class="line c0"') == 3
    assert drawn.count("<circle") == 2
    assert '["2 tokens"' not in tips(chart)
    assert '["3 tokens"' in tips(chart)


def test_text_from_runs_cannot_break_out() -> None:
    evil = "</script><b>\"'&"
    series = Series(np.array([0.0, 1.0]), np.array([0.0, 1.0]), 0, evil)
    chart = LineChart(evil, (Finding(evil),), evil, (series,), value_text)
    ElementTree.fromstring(draw_lines(chart, log=True))
    assert "<" not in tips(chart)
    cells = HeatMap(evil, (), evil, evil, np.array([1.0, 2.0]), (evil,), np.array([[1.0], [np.nan]]), value_text)
    ElementTree.fromstring(draw_heat_map(cells, log=True))


def test_labels_and_ticks() -> None:
    assert without_idle_zeros(["0.100", "0.200"]) == ["0.1", "0.2"]
    assert without_idle_zeros(["5.000", "6.000"]) == ["5", "6"]
    assert without_idle_zeros(["0", "0.010"]) == ["0", "0.01"]
    assert without_idle_zeros(["2.5K", "5K"]) == ["2.5K", "5K"]
    assert cut("short") == "short"
    assert len(cut("a" * 50)) == 24
    assert shade(SEQUENTIAL, 0) == SEQUENTIAL[0]
    assert shade(SEQUENTIAL, 2) == SEQUENTIAL[-1]


def test_a_colour_means_the_same_in_all_maps_of_a_quantity() -> None:
    maps = [
        HeatMap(name, (), "layer", "ratio", np.array([1.0, 2.0]), ("0",), np.array(values)[:, None], value_text)
        for name, values in (("a", [0.5, 2.0]), ("b", [0.0, np.nan]), ("c", [np.nan, np.nan]))
    ]
    assert [value_range(found) for found in on_one_scale(maps)] == [(0.0, 2.0)] * 3
    assert value_range(on_one_scale(maps[2:])[0]) == (0.0, 1.0)
