"""tools/report.py as a user calls it, and the page in a real browser."""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from types import ModuleType

import pytest

from tests.report.browser import Browser, find_browser
from tests.report.runs import rows_of, write_run


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("report")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {f"{arm}{seed}": write_run(root / f"{arm}{seed}", rows_of(depth=depth, seed=seed), seed=seed)
            for arm, depth in (("mixed", 0.06), ("plain", 0.13)) for seed in (1, 2)}  # fmt: skip


@pytest.fixture(scope="module")
def page(tool: ModuleType, runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    groups = [f"{arm}={runs[f'{arm}1']},{runs[f'{arm}2']}" for arm in ("mixed", "plain")]
    assert tool.main(["--group", groups[0], "--group", groups[1], "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium here; install one (apt-get install chromium) to look at the report")
    with Browser(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


def colours(png: bytes) -> int:
    image = pytest.importorskip("PIL.Image", reason="needs Pillow to look at a screenshot")
    return len(image.open(BytesIO(png)).convert("RGB").getcolors(1 << 24))


def test_a_browser_finds_nothing_to_complain_of(page: Path, browser: Browser) -> None:
    browser.media()
    browser.open(page.as_uri())
    assert browser.evaluate("document.querySelectorAll('svg.chart').length") > 20
    assert colours(browser.screenshot()) > 50
    # A pointer over a chart shows its values.
    browser.evaluate("document.querySelector('svg.chart.log').scrollIntoView()")
    box = browser.evaluate("document.querySelector('svg.chart.log').getBoundingClientRect().toJSON()")
    browser.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    told = browser.evaluate("document.getElementById('tip').innerText")
    assert "tokens" in told
    assert "mixed" in told
    # The other token axis.
    seen = "[...document.querySelectorAll('svg.chart')].filter(s => s.checkVisibility()).map(s => s.classList[1])"
    assert set(browser.evaluate(seen)) == {"log"}
    browser.evaluate("document.querySelector('label[for=linear]').click()")
    assert set(browser.evaluate(seen)) == {"linear"}
    assert browser.requests == [page.as_uri()]
    assert browser.complaints == []


def test_it_fits_a_laptop_a_phone_and_paper(page: Path, browser: Browser) -> None:
    for width in (1280, 420):
        browser.media()
        browser.open(page.as_uri(), width=width)
        assert browser.evaluate("document.documentElement.scrollWidth") == width
    background = "getComputedStyle(document.body).backgroundColor"
    browser.media(dark=True)
    assert browser.evaluate(background) == "rgb(20, 24, 29)"
    browser.media(dark=True, print_=True)
    assert browser.evaluate(background) == "rgb(255, 255, 255)"
    assert browser.pdf().startswith(b"%PDF")
    assert browser.complaints == []


def test_text_of_charts_stays_inside_them(page: Path, browser: Browser) -> None:
    browser.media()
    browser.open(page.as_uri())
    outside = """[...document.querySelectorAll('svg.chart text')].filter(t => t.checkVisibility()).filter(t => {
        const a = t.getBoundingClientRect(), b = t.closest('svg').getBoundingClientRect();
        return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
    }).map(t => t.textContent)"""
    assert browser.evaluate(outside) == []


def test_png_files(tool: ModuleType, runs: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs megacpt[plot]")
    folder = tmp_path / "png"
    command = [str(runs["mixed1"]), str(runs["plain1"]), "--output", str(tmp_path / "r.html"), "--png", str(folder)]
    assert tool.main(command) == 0
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"general-loss.png", "general-next-token-accuracy.png", "learning-rate.png"} <= written.keys()
    assert all(data.startswith(b"\x89PNG") and colours(data) > 20 for data in written.values())


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["/no/where"], "no such run"),
        ([], "no run is named"),
        (["--group", "x"], "write NAME=RUN"),
        (["{empty}"], "no metrics.jsonl"),
        (["{damaged}"], "line 2 is damaged"),
        (["{run}", "--output", "{file}/r.html"], "cannot be made"),
        (["/no/where", "--watch"], "no such run"),
    ],
)
def test_a_mistake_is_one_sentence(
    tool: ModuleType,
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    told: str,
) -> None:
    for name in ("empty", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged" / "metrics.jsonl").write_text(
        '{"iteration": 0, "consumed_tokens": 0, "validation": "a", "loss": 1}\n{x\n'
    )
    (tmp_path / "file").write_text("")
    places = {"run": runs["mixed1"]} | {name: tmp_path / name for name in ("empty", "damaged", "file")}
    output = [] if "--output" in command else ["--output", str(tmp_path / "r.html")]
    assert tool.main([part.format(**places) for part in command] + output) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert told in said
    assert said.count("\n") == 1
    assert not (tmp_path / "r.html").exists()
