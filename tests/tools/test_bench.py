import pytest
import torch

from megacpt.errors import UserError


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
