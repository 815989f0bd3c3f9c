"""JSONL to .bin/.idx, from process start to exit: ours beside the peers at hand, on the same file and cores."""

import hashlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megacpt.bench.processes import timed
from megacpt.bench.rows import OURS, Recorder
from megacpt.data.tokens.indexed import bin_path
from megacpt.errors import UserError

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SLOW_MB = 10
"""A peer that needs seconds for a megabyte gets the first so many; its rate is told with that."""
STARTS = 3
"""Times that a start is measured; the median counts, since a working rate depends on it."""


@dataclass(frozen=True)
class Case:
    """What to encode. `megatron`: a checkout of Megatron-LM, or None."""

    text: Path
    tokenizer_type: str
    tokenizer_model: Path
    folder: Path
    megatron: Path | None = None

    @property
    def megabytes(self) -> float:
        """Size of the text file."""
        return self.text.stat().st_size / 1e6


def head_of(text: Path, megabytes: float, folder: Path) -> Path:
    """The first megabytes of a file, in whole lines."""
    part = folder / f"head_{megabytes:g}mb_{text.name}"
    if not part.is_file():
        with open(text, "rb") as source, open(part, "wb") as target:
            while target.tell() < megabytes * 1e6 and (line := source.readline()):
                target.write(line)
    return part


def ours(case: Case, text: Path, workers: int) -> tuple[list[str], str]:
    """Our command, and the prefix that it writes."""
    out = case.folder / f"ours_{workers}"
    command = [sys.executable, str(TOOLS / "preprocess.py"), "--input", str(text), "--json-keys", "text"]
    command += ["--output-prefix", str(out), "--tokenizer-type", case.tokenizer_type]
    command += [
        "--tokenizer-model",
        str(case.tokenizer_model),
        "--append-eod",
        "--workers",
        str(workers),
        "--overwrite",
    ]
    return command, f"{out}_text_document"


def stock(case: Case, text: Path, workers: int) -> tuple[list[str], str]:
    """The plain loop: the tokenizer's own library, and megatron-core's builder."""
    out = case.folder / "stock"
    return [
        sys.executable, "-m", "megacpt.bench.stock_preprocess", str(text), str(out), case.tokenizer_type,
        str(case.tokenizer_model),
    ], str(out)  # fmt: skip


def megatron(script: str) -> Callable[[Case, Path, int], tuple[list[str], str]]:
    """A script of a Megatron-LM checkout; the fast one has one process, and all the threads that it finds cores."""

    def command(case: Case, text: Path, workers: int) -> tuple[list[str], str]:
        assert case.megatron is not None
        out, fast = case.folder / script.removesuffix(".py"), script.endswith("_fast.py")
        words = [sys.executable, str(case.megatron / "tools" / script), "--input", str(text)]
        words += ["--output-prefix", str(out), "--tokenizer-model", str(case.tokenizer_model)]
        words += ["--append-eod", "--tokenizer-type", case.tokenizer_type]
        words += ["--use-gigatoken"] if fast else ["--workers", str(workers)]
        return words, f"{out}_text_document"

    return command


def measure(recorder: Recorder, case: Case, cores: int) -> None:
    """Rows for one core and, where there are more, for `cores`; and the gate: every tool's bytes equal ours.

    Raises:
        UserError: a tool fails, or writes other bytes; then nothing is said of its speed.
    """
    shutil.rmtree(case.folder, ignore_errors=True)
    case.folder.mkdir(parents=True)
    tiny, small = head_of(case.text, 0.01, case.folder), head_of(case.text, SLOW_MB, case.folder)
    name = f"{case.text.name} {case.megabytes:.0f} MB, {case.tokenizer_model.name}"
    command, prefix = ours(case, small, 1)
    timed(command, 1)
    expected = _sha(prefix)
    for workers in (1, cores) if cores > 1 else (1,):
        title = f"{name}, {workers} core{'s' if workers > 1 else ''}"
        start = median(timed(ours(case, tiny, workers)[0], workers).seconds for _ in range(STARTS))
        done = timed(ours(case, case.text, workers)[0], workers)
        recorder.add("preprocess", title, OURS, case.megabytes / done.seconds, "MB/s", "wall, start-up included")
        recorder.add("preprocess", title, OURS, case.megabytes / max(1e-9, done.seconds - start), "MB/s working")
        recorder.add("preprocess", title, OURS, start, "s start-up")
        recorder.add("preprocess", title, OURS, done.resident, "MB resident", "main process")
        for tool, peer in _peers(case):
            _measure_peer(recorder, (title, tool, expected), case, peer, workers)


def _peers(case: Case) -> list[tuple[str, Callable[[Case, Path, int], tuple[list[str], str]]]]:
    peers: list[tuple[str, Callable[[Case, Path, int], tuple[list[str], str]]]] = [("tokenizer + megatron-core", stock)]
    if case.megatron is not None:
        peers.append(("preprocess_data.py", megatron("preprocess_data.py")))
        if case.tokenizer_type == "HuggingFaceTokenizer":
            peers.append(("preprocess_data_fast.py", megatron("preprocess_data_fast.py")))
    return peers


def _measure_peer(
    recorder: Recorder,
    what: tuple[str, str, str],
    case: Case,
    peer: Callable[[Case, Path, int], tuple[list[str], str]],
    workers: int,
) -> None:
    title, tool, expected = what
    fast = tool.endswith("_fast.py")
    text = case.text if fast else head_of(case.text, SLOW_MB, case.folder)
    environment = {"PYTHONPATH": str(case.megatron)} if case.megatron is not None else {}
    command, prefix = peer(case, text, workers)
    try:
        done = timed(command, workers, environment)
    except UserError as error:
        recorder.add("preprocess", title, tool, 0, "MB/s", f"did not run: {str(error)[-120:]}")
        return
    if not fast and _sha(prefix) != expected:
        recorder.add("preprocess", title, tool, 0, "MB/s", "writes other tokens: no speed is told of it")
        return
    size = text.stat().st_size / 1e6
    note = "" if fast else f"on the first {SLOW_MB} MB"
    recorder.add("preprocess", title, tool, size / done.seconds, "MB/s", note)


def _sha(prefix: str) -> str:
    with open(bin_path(prefix), "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
