import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megacpt.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def test_data_needs_its_input(refuse, tmp_path):
    words = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tmp_path / "t.model")
    refuse("no such file; give --input a JSONL file", "bench", "data", "--input", tmp_path / "none.jsonl", *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would measure")
def test_kernels_are_timed_on_a_gpu_alone(refuse, tmp_path):
    refuse("kernels are timed on a GPU", "bench", "kernels", "--output", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_case_is_named(refuse, tmp_path):
    refuse("--cases huge: no such case", "bench", "checkpoint", "--cases", "huge", "--output", tmp_path)


def test_the_index_alone(run, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n')
    words = ["--input", text, "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tmp_path / "t.model"]
    options = ["--only", "index", "--documents", "400000", "--sources", "3", "--output", tmp_path / "rows"]
    code, out, _ = run("bench", "data", *words, *options)
    assert (code, out.count("us/sample")) == (0, 1)
    assert (tmp_path / "rows" / "data.csv").read_text().count("us/sample") == 1
    assert "us/sample" in (tmp_path / "rows" / "README.md").read_text()


def test_what_was_measured_before_a_failure_is_kept(load_tool, tmp_path, monkeypatch):
    def breaks(options, work, recorder):
        recorder.add("train", "a case", "megacpt", 5, "tokens/s")
        assert "a case" in (tmp_path / "train.csv").read_text()
        raise UserError("the card fell off the bus")

    bench = load_tool("bench")
    monkeypatch.setitem(bench.COMMANDS, "train", breaks)
    assert bench.main(["train", "--output", str(tmp_path)]) == 2
    assert "| megacpt | 5.0 | tokens/s |" in (tmp_path / "README.md").read_text()


def test_all_goes_on_after_a_part_that_fails(load_tool, tmp_path, monkeypatch, capsys):
    begun = []

    def breaks(*_):
        begun.append("checkpoint")
        raise UserError("the disk is full")

    bench = load_tool("bench")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "_smallest_checkpoint", breaks)
    monkeypatch.setattr(bench, "train", lambda *_: begun.append("train"))
    assert bench.main(["all", "--output", str(tmp_path)]) == 2
    assert begun == ["checkpoint", "train"]
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "kernels: not measured, for there is no GPU here",
        "data: not measured, without --input, --tokenizer-type and --tokenizer-model",
    ]
    assert err.splitlines()[-1] == "error: the disk is full"


def test_a_run_that_is_asked_to_end_ends_what_it_started_and_writes_the_readme(tmp_path):
    """As `timeout` asks, while a process of its own is at work."""
    output, work = tmp_path / "rows", tmp_path / "work"
    command = [sys.executable, "tools/bench.py", "train", "--cases", "tiny", "--steps", "20"]
    process = subprocess.Popen([*command, "--output", output, "--work", work], cwd=REPOSITORY)
    until = time.monotonic() + 300
    while not (output / "train.csv").exists() or not (children := running(work)):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 143
    while set(children) & set(running(work)):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert "a large square matmul" in (output / "README.md").read_text()


def running(work):
    """Processes that have a path below `work` in their command."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().split(b"\0")
            if b"megacpt.bench.train_hf" in command and any(bytes(work) in word for word in command):
                found.append(folder.name)
    return found
