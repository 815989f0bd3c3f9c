"""One HTML file about runs: the stability gap, its numbers, training, weights, configuration.

    python tools/report.py RUN [RUN ...] --output report.html
    python tools/report.py --group mixture=a1,a2,a3 --group plain=b1,b2,b3 --output report.html
    python tools/report.py RUN --watch

RUN is a run's folder (`save.dir`), or NAME=FOLDER to call it NAME.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from megacpt.errors import exit_code
from megacpt.files import write_text
from megacpt.report.arms import make_arms
from megacpt.report.named import read_named
from megacpt.report.page import make_page
from megacpt.report.watch import watch


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --help says what each option means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="a run's folder, or NAME=FOLDER")
    add("--group", action="append", default=[], metavar="NAME=RUN,RUN,...", help="runs that differ by seed alone")
    add("--output", type=Path, metavar="FILE.html", help="the report (default: report.html)")
    add("--png", type=Path, metavar="DIR", help="also the charts as PNG files (needs matplotlib)")
    add("--title", help="heading of the report (default: the runs' names)")
    add("--watch", action="store_true", help="show the runs in this terminal until Ctrl-C; writes no file")
    add("--every", type=float, default=5.0, metavar="SECONDS", help="how often --watch looks (default 5)")
    return parser.parse_args(arguments)


def report(options: argparse.Namespace) -> None:
    """Write the report.

    Raises:
        UserError: a run is missing or damaged, or the place cannot be written.
    """
    runs, groups = read_named(options.runs, options.group)
    arms = make_arms(runs, groups)
    names = ", ".join(arm.name for arm in arms[:4]) + (f" and {len(arms) - 4} more" if len(arms) > 4 else "")
    title = options.title or f"Continual pre-training: {names}"
    output = options.output or Path("report.html")
    write_text(output, make_page(title, arms, datetime.now()))
    print(f"{output}: {len(runs)} run{'s' if len(runs) > 1 else ''}")
    if options.png:
        from megacpt.report.png import write_pngs

        print(f"{options.png}: {len(write_pngs(options.png, arms))} charts")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when done, 2 on a user's mistake."""
    options = parse(arguments)
    if options.watch:
        return exit_code(lambda: watch(lambda: read_named(options.runs, options.group)[0], options.every))
    return exit_code(lambda: report(options))


if __name__ == "__main__":
    sys.exit(main())
