"""Rows of measurements: what was measured, on what, by which commit; and benchmarks/README.md, made from them."""

import csv
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from megacpt.files import atomic_write, write_text


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        run: when the run began, UTC; rows of one run are compared with one another.
        bench, case: what was measured, and on which input or shape.
        tool: whose number it is; "megacpt" is ours.
        value, unit: more is better where the unit's first word is a rate (ends in /s) or %, less elsewhere.
        note: what a reader has to know.
    """

    run: str
    commit: str
    device: str
    bench: str
    case: str
    tool: str
    value: float
    unit: str
    note: str = ""

    @property
    def more_is_better(self) -> bool:
        """Whether the unit is one of which more is better."""
        return self.unit.split()[0].endswith(("/s", "%"))


COLUMNS = tuple(field.name for field in fields(Row))
OURS = "megacpt"
CORES = " cores"
"""How the name of a device ends that is a CPU."""
DATA_PARTS = ("preprocess", "scoring", "index", "read")
"""Benches whose rows share a file."""
ON_GPU = (
    *(("kernels", name) for name in ("RMSNorm", "SwiGLU", "RoPE", "cross-entropy", "linear cross-entropy")),
    *(("train", name) for name in ("smollm2-135m", "llama3.2-1b", "llama3.2-3b", "8 layers of llama3-8b")),
)
"""What only a GPU's numbers say something of: bench, and what a case's name begins with."""
TIME_UP = "not measured: the time was up"
"""A note: the README goes on telling what an earlier run has measured."""


@dataclass
class Recorder:
    """Collects the rows of one run, says each as it comes, and writes it to FOLDER/*.csv if there is a folder."""

    device: str
    rows: list[Row]
    run: str
    commit: str
    folder: Path | None = None

    @classmethod
    def begin(cls, device: str, folder: Path) -> "Recorder":
        """A recorder for a run that begins now."""
        return cls(device, [], datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), commit(), folder)

    def add(self, bench: str, case: str, tool: str, value: float, unit: str, note: str = "") -> None:
        """Record one number. It is on disk when this returns, whatever becomes of the run.

        Raises:
            UserError: the file cannot be written.
        """
        row = Row(self.run, self.commit, self.device, bench, case, tool, float(f"{value:.4g}"), unit, note)
        self.rows.append(row)
        if self.folder is not None:
            append(self.folder / f"{'data' if bench in DATA_PARTS else bench}.csv", [row])
        told = f" ({note})" if note else ""
        print(f"{bench:<12} {case:<44} {tool:<28} {row.value:>12,} {unit}{told}", flush=True)


def commit() -> str:
    """The commit of the sources, with a + where they were changed since; "unknown" outside a repository."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe_cpu() -> str:
    """The processor and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {len(os.sched_getaffinity(0))}{CORES}"


def describe_device(with_gpu: bool) -> str:
    """The GPU, where there is one and it is what is measured; else the processor."""
    if with_gpu:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    return describe_cpu()


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a CSV file, atomically."""
    lines = read(path) + list(rows)
    with atomic_write(path, "w") as handle:
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in lines)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; none where there is no file."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as handle:
        return [Row(value=float(row.pop("value")), **row) for row in csv.DictReader(handle)]


def write_readme(folder: Path) -> None:
    """Write FOLDER/README.md from the newest run of every case in FOLDER/*.csv."""
    parts = [
        "# Benchmarks",
        "",
        "Made by `python tools/bench.py` from the CSV files here; of every case, the newest run that measured it.",
        "`ours / theirs` is how many times better our number is than theirs, in the same run on the same machine.",
        "",
    ]
    for path in sorted(folder.glob("*.csv")):
        parts += [f"## {path.stem}", ""]
        rows = read(path)
        for case in dict.fromkeys((row.bench, row.case, row.device) for row in rows):
            of_case = [row for row in rows if (row.bench, row.case, row.device) == case]
            newest = max(row.run for row in [row for row in of_case if row.note != TIME_UP] or of_case)
            parts += _case([row for row in of_case if row.run == newest])
    write_text(folder / "README.md", "\n".join([*parts, *_not_measured(folder)]))


def _not_measured(folder: Path) -> list[str]:
    rows = [row for path in folder.glob("*.csv") for row in read(path)]
    known = {(row.bench, row.case.split(", ")[0]) for row in rows if row.value and not row.device.endswith(CORES)}
    missing = [of for of in ON_GPU if of not in known]
    lines = ["## On a GPU", "", "| bench | case | value |", "|---|---|---|"]
    return [*lines, *(f"| {bench} | {case} | not measured |" for bench, case in missing), ""] if missing else []


def _case(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    lines = [
        f"**{first.bench}, {first.case}** ({first.device}; commit {first.commit}; {first.run} UTC)",
        "",
        "| tool | value | unit | ours / theirs | note |",
        "|---|---:|---|---:|---|",
    ]
    ours = {row.unit: row.value for row in rows if row.tool == OURS}
    for row in rows:
        ratio = ""
        if row.tool != OURS and row.unit in ours and row.value and ours[row.unit]:
            better = ours[row.unit] / row.value if row.more_is_better else row.value / ours[row.unit]
            ratio = f"{better:.3g}x"
        lines.append(f"| {row.tool} | {row.value:,} | {row.unit} | {ratio} | {row.note} |")
    return [*lines, ""]
