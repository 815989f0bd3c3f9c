"""The report: one HTML file that asks nobody for anything."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files

import yaml

from megacpt.report.arms import Arm
from megacpt.report.chart import Chart, Finding, LineChart
from megacpt.report.gap_charts import difference_charts, gap_charts
from megacpt.report.heat import draw_heat_map
from megacpt.report.run import RunData
from megacpt.report.run_tables import configuration_table, provenance_table, run_table
from megacpt.report.svg import draw_lines, tips
from megacpt.report.tables import Cell, Table, comparison_table, gap_table, headline, suite_table
from megacpt.report.training_charts import training_charts, weight_charts

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def make_page(title: str, arms: Sequence[Arm], written: datetime) -> str:
    """The whole page."""
    runs = [(run, arm.colour) for arm in arms for run in arm.runs]
    one_of = "" if all(arm.single for arm in arms) else " What is drawn of one run is drawn of the first of each group."
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(headline(arms))}</p>',
        _table(run_table(arms)),
        *(f'<p class="warning">{escape(notice)}</p>' for notice in _notices(arms)),
        *_gap_section(arms),
        *_comparison_sections(arms),
        *_suites(arms),
        *_section("Training", f"Faint: as logged. Bold: running mean.{one_of}",
                  training_charts(runs)),
        *_section("Weights", f"How far weights are from the base; whether domain and general gradients agree.{one_of}",
                  weight_charts(runs)),
        *_provenance([run for run, _ in runs]),
        f'<p class="soft">Written {written:%Y-%m-%d %H:%M} by megacpt from {len(runs)} run'
        f"{'s' if len(runs) > 1 else ''}.</p>",
    ]  # fmt: skip
    assets = files("megacpt.report") / "assets"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head><body>"
        '<input class="pick" type="radio" name="scale" id="log" checked aria-label="log token axis">'
        '<input class="pick" type="radio" name="scale" id="linear" aria-label="linear token axis">'
        f'<main>{"".join(body)}</main><div id="tip" role="status" hidden></div>'
        f"<script>\n{script}</script></body></html>\n"
    )


SCALE = (
    '<p class="scale">Token axis: <label for="log">log, the first steps legible</label>'
    '<label for="linear">linear</label></p>'
)


def _notices(arms: Sequence[Arm]) -> Iterable[str]:
    several = sum(len(arm.runs) for arm in arms) > 1
    for arm in arms:
        for run in arm.runs:
            yield from (f"{run.name}: {notice}" if several else notice for notice in run.notices)


def _gap_section(arms: Sequence[Arm]) -> list[str]:
    charts = gap_charts(arms)
    if not charts:
        return ["<h2>The stability gap</h2><p>No evaluation yet: set eval.sets and eval.at to see it.</p>"]
    seeds = any(not arm.single for arm in arms)
    bands = f"Bands are 95 % {'t intervals over seeds of the change since step 0' if seeds else 'intervals'}."
    text = (
        f"Each ability from step 0 on. The dotted line is its level before training. {bands} A bracket marks a dip "
        "that is more than chance, an open ring the return to the level of step 0."
    )
    numbers = (
        "<h2>The gap\u2019s numbers</h2><p>Depth, area and recovery are measured against step 0, linear between "
        "evaluations. A dip is significant where its paired interval excludes zero or, without one, where the worst "
        "value lies outside the interval of step 0; it is not tested where neither is known. Bold is "
        "significant; in small type stands the 95 % interval, of a depth or a difference the paired one.</p>"
    )
    return [*_section("The stability gap", text, charts), numbers, _table(gap_table(arms))]


def _section(title: str, text: str, charts: Sequence[Chart]) -> list[str]:
    if not charts:
        return []
    return [
        f"<h2>{escape(title)}</h2><p>{escape(text)}</p>{SCALE}",
        f'<div class="grid2">{"".join(map(_figure, charts))}</div>',
    ]


def _figure(chart: Chart) -> str:
    said = "".join(f"<li>{_key(finding)}{escape(finding.text)}</li>" for finding in chart.findings)
    if isinstance(chart, LineChart):
        drawn = draw_lines(chart, log=True) + draw_lines(chart, log=False)
        data = f'<script type="application/json">{tips(chart)}</script>'
    else:
        drawn, data = draw_heat_map(chart, log=True) + draw_heat_map(chart, log=False), ""
    return f"<figure><h3>{escape(chart.title)}</h3><ul>{said}</ul>{drawn}{data}</figure>"


def _key(finding: Finding) -> str:
    if not finding.name:
        return ""
    dashed = " dashed" if finding.colour >= 4 else ""
    return f'<span class="key c{finding.colour % 8}{dashed}"></span><b>{escape(finding.name)}</b>: '


def _comparison_sections(arms: Sequence[Arm]) -> Iterable[str]:
    if all(arm.single for arm in arms):
        return
    first, *others = arms
    for other in others:
        yield f"<h2>{escape(first.name)} against {escape(other.name)}</h2>"
        yield (
            "<p>Differences are first minus second. Intervals are Student\u2019s t at 95 %: over pairs of equal seeds, "
            "or Welch\u2019s where seeds differ. A bootstrap of so few seeds would be too narrow.</p>"
        )
        if not (first.ended and other.ended):
            yield "<p>Some of these runs are not at their end: final, best and area are of what there is.</p>"
        charts = difference_charts(first, other)
        yield f'{SCALE}<div class="grid2">{"".join(map(_figure, charts))}</div>'
        yield _table(comparison_table(first, other))


def _suites(arms: Sequence[Arm]) -> Iterable[str]:
    names = dict.fromkeys(suite.name for arm in arms for run in arm.runs for suite in run.suites)
    for name in names:
        yield (
            f"<h2>{escape(name)}</h2><p>Scores in %, at step 0 and at each run\u2019s last evaluation. Averages are "
            "unweighted, of these cells; a suite that lacks a task has none. The best of a column is bold.</p>"
        )
        yield _table(suite_table(arms, name))


def _provenance(runs: Sequence[RunData]) -> Iterable[str]:
    yield "<h2>Configuration and provenance</h2>"
    if len(runs) > 1:
        differing = configuration_table(runs)
        same = "" if differing.rows else "<p>The runs\u2019 configurations are equal.</p>"
        yield f"<h3>Where the runs differ</h3>{_table(differing, of='wide') if differing.rows else same}"
    for run in runs:
        heading = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        yield heading + _table(provenance_table(run), of="wide")
        if run.provenance.announced:
            yield _details("What it said at its start", run.provenance.announced)
        if run.provenance.config:
            text = yaml.safe_dump(run.provenance.config, sort_keys=False, allow_unicode=True)
            yield _details("Resolved configuration", text)


def _details(summary: str, text: str) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def _table(table: Table, of: str = "") -> str:
    number = ['class="number"' if at >= table.words else "" for at in range(len(table.columns))]
    head = "".join(f"<th {number[at]}>{escape(name)}</th>" for at, name in enumerate(table.columns))
    rows = "".join(_row(table, at, number) for at in range(len(table.rows)))
    return f'<div class="scroll {of}"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _row(table: Table, at: int, number: Sequence[str]) -> str:
    row = table.rows[at]
    # A metric with several rows is named in the first of them.
    repeated = at > 0 and table.words > 1 and row[0].colour is None and table.rows[at - 1][0] == row[0]
    cells = [_cell(cell, number[column]) for column, cell in enumerate(row)]
    if repeated:
        cells[0] = f'<td class="repeat">{escape(row[0].text)}</td>'
    return f"<tr>{''.join(cells)}</tr>"


def _cell(cell: Cell, attribute: str) -> str:
    text = f"<b>{escape(cell.text)}</b>" if cell.strong else escape(cell.text)
    dot = "" if cell.colour is None else f'<span class="dot c{cell.colour % 8}"></span>'
    small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
    return f"<td {attribute}>{dot}{text}{small}</td>"
