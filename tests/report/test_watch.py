import io
import json
from pathlib import Path

import numpy as np
import pytest

from megacpt.errors import UserError
from megacpt.report.reading import read_run
from megacpt.report.watch import BLOCKS, CLEAR, screen, sparkline, watch
from tests.report.runs import rows_of, write_run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_sparklines() -> None:
    assert sparkline(np.arange(8.0), 8) == BLOCKS
    assert sparkline(np.arange(800.0), 8) == BLOCKS
    assert sparkline(np.array([1.0, 1.0]), 8) == "▁▁"
    assert sparkline(np.array([0.0, np.nan, 1.0]), 8) == "▁ █"
    assert sparkline(np.array([np.nan] * 20), 8) == " " * 8
    assert sparkline(np.array([]), 8) == ""


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_screen_fits_and_says_how_far_it_is(tmp_path: Path, width: int) -> None:
    run = read_run(write_run(tmp_path / "run", rows_of(steps=120), steps=200), "run")
    lines = screen([run], width).splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("run: stopped, 120 of 200 steps")
    assert any("loss medical" in line for line in lines)
    assert any("general loss" in line for line in lines)


def test_it_looks_until_the_run_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder, rows_of(steps=10), steps=200)
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        text = "".join(json.dumps(row) + "\n" for row in rows_of())
        (folder / "metrics.jsonl").write_text(text if len(waits) == 2 else "{broken\n")

    out = Terminal()
    watch(lambda: [read_run(folder, "run")], 2.0, out, wait)
    assert waits == [2.0, 2.0]
    looks = out.getvalue().split(CLEAR)[1:]
    assert "10 of 200" in looks[0]
    assert "line 1 is damaged" in looks[1]
    assert "run: ended" in looks[2]


def test_a_run_that_has_not_begun_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()

    def wait(_: float) -> None:
        (folder / "metrics.jsonl").write_text("")
        raise KeyboardInterrupt

    out = io.StringIO()
    watch(lambda: [read_run(folder, "run")], 1.0, out, wait)
    assert "no metrics.jsonl" in out.getvalue()
    assert CLEAR not in out.getvalue()


def test_a_run_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run"):
        watch(lambda: [read_run(tmp_path / "absent", "x")], 1.0, io.StringIO(), lambda _: None)
