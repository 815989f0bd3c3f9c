"""The real command line, as a user runs it."""

import gzip
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece

from megacpt.data.tokens.indexed import IndexedDataset
from megacpt.data.tokens.manifest import read_manifest
from megacpt.files import sha256_of

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "preprocess.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
GOOD = '{"text": "the first words"}\n{"text": "and the last"}\n'


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with with_eod.model and without_eod.model (SentencePiece)."""
    folder = tmp_path_factory.mktemp("models")
    for name, eos in (("with_eod", 2), ("without_eod", -1)):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the first and the last words of a document"] * 50),
            model_writer=model,
            vocab_size=60,
            hard_vocab_limit=False,
            eos_id=eos,
            minloglevel=2,
        )
        (folder / f"{name}.model").write_bytes(model.getvalue())
    return folder


def command(folder, models, *inputs, prefix="out", model="with_eod.model", options=()):
    paths = [str(path) for path in inputs]
    line = [sys.executable, str(TOOL), "--input", *paths, "--output-prefix", str(folder / prefix), "--append-eod"]
    line += ["--tokenizer-engine", "reference"]  # its tiny unigram has no fast engine
    kind = "SentencePieceTokenizer"
    return [*line, "--tokenizer-type", kind, "--tokenizer-model", str(models / model), *options]


def run(line, **options):
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def run_here(load_tool, capsys):
    """`run` without a process of its own."""

    def call(line):
        capsys.readouterr()
        return subprocess.CompletedProcess(line, load_tool("preprocess").main(line[2:]), *capsys.readouterr())

    return call


def outputs(folder):
    return sorted(path.name for path in folder.iterdir() if "out" in path.name)


def assert_refused(done, *words):
    assert done.returncode == 2, done
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr


def test_a_run(tmp_path, models):
    (tmp_path / "a.jsonl").write_text(GOOD + "{bad\n")
    done = run(command(tmp_path, models, tmp_path / "a.jsonl", options=["--skip-invalid"]))
    assert done.returncode == 0, done.stderr
    assert outputs(tmp_path) == [f"out_text_document.{suffix}" for suffix in ("bin", "idx", "json")]
    dataset, manifest = IndexedDataset(tmp_path / "out_text_document"), read_manifest(tmp_path / "out_text_document")
    assert len(dataset) == 2
    assert manifest.skipped == {"invalid_json": 1}
    assert f"2 documents (0 empty), {dataset.tokens} tokens, uint16; skipped rows: 1 invalid_json" in done.stdout
    assert [int(dataset.read(i)[-1]) for i in range(2)] == [2, 2]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", GOOD.encode() + b"{bad\n", ["a.jsonl:3", "invalid JSON"]),
        ("a.jsonl", b'{"txt": "a"}\n', ["a.jsonl:1", "no key 'text'"]),
        ("a.jsonl", b'{"text": 3}\n', ["a.jsonl:1", "not a string"]),
        ("a.jsonl", b'{"text": "\xff"}\n', ["a.jsonl:1", "invalid UTF-8"]),
        ("a.jsonl", b"", ["the corpus is empty"]),
        ("a.jsonl.gz", gzip.compress(GOOD.encode() * 500)[:-9], ["a.jsonl.gz", "truncated after line 1,000"]),
        ("a.jsonl.gz", GOOD.encode(), ["a.jsonl.gz", "damaged"]),
        ("a.jsonl.zst", GOOD.encode(), ["a.jsonl.zst", "damaged"]),
        ("a.parquet", GOOD.encode(), ["a.parquet", "damaged Parquet"]),
        ("a.txt", GOOD.encode(), ["a.txt", "unknown kind"]),
    ],
)
def test_bad_input_is_refused(tmp_path, models, run_here, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert_refused(run_here(command(tmp_path, models, tmp_path / name)), *words)
    assert outputs(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inputs": ["none*.jsonl"]}, ["no file matches"]),
        ({"model": "without_eod.model"}, ["without_eod.model", "--append-eod"]),
        ({"model": "nowhere.model"}, ["nowhere.model", "no such tokenizer file"]),
        ({"prefix": "a.jsonl/out"}, ["a.jsonl: cannot be made", "choose another place"]),
        ({"options": ["--workers", "0"]}, ["--workers 0"]),
        ({"options": ["--json-keys", "text", "text"]}, ["give each key once"]),
        ({"options": ["--tokenizer-type", "HuggingFaceTokenizer"]}, ["not a Hugging Face tokenizer.json"]),
    ],
)
def test_a_bad_command_is_refused(tmp_path, models, run_here, changes, words):
    (tmp_path / "a.jsonl").write_text(GOOD)
    inputs = changes.pop("inputs", ["a.jsonl"])
    assert_refused(run_here(command(tmp_path, models, *(tmp_path / name for name in inputs), **changes)), *words)
    assert outputs(tmp_path) == []


def test_disk_full(tmp_path, models):
    small = tmp_path / "small"
    small.mkdir()
    (tmp_path / "a.jsonl").write_text(GOOD * 40_000)
    line = command(small, models, tmp_path / "a.jsonl")
    script = 'mount -t tmpfs -o size=256k none "$0" && "$@"; code=$?; ls -A "$0"; exit $code'
    if shutil.which("unshare") is None or run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", small]).returncode:
        pytest.skip("a small file system cannot be mounted here")
    assert_refused(run(["unshare", "-rm", "sh", "-c", script, small, *line]), "the disk is full")


def test_nothing_heavy_is_imported(tmp_path, models):
    (tmp_path / "a.jsonl").write_text(GOOD)
    line = command(tmp_path, models, tmp_path / "a.jsonl")
    script = (
        "import runpy, sys\nsys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit as end: assert end.code == 0\n"
        "print(*sorted(sys.modules))"
    )
    done = run([sys.executable, "-c", script, *line[1:]])
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.splitlines()[-1].split())
    assert "megacpt.data.tokens.preprocess" in imported
    assert not imported & {"torch", "transformers", "megatron", "pyarrow", "tqdm", "ray"}


def start_long_run(folder, models):
    """A run of two workers over enough text to be caught in the middle; its process and its workers."""
    (folder / "a.jsonl").write_text((json.dumps({"text": "the first and the last words " * 300}) + "\n") * 6_000)
    line = command(folder, models, folder / "a.jsonl", options=["--workers", "2"])
    process = subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not any(path.stat().st_size for path in folder.glob(".out*/0.bin")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    workers = list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
    assert len(workers) == 2
    return line, process, workers


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks up processes in /proc")
def test_kill_9_leaves_nothing_finished_and_the_same_command_works(tmp_path, models):
    line, process, workers = start_long_run(tmp_path, models)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (left,) = outputs(tmp_path)
    assert left.endswith(".partial")
    end = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < end, "the workers outlive the run"
        time.sleep(0.05)
    (tmp_path / "a.jsonl").write_text(GOOD)
    done = run(line)
    assert done.returncode == 0, done.stderr
    assert outputs(tmp_path) == [f"out_text_document.{suffix}" for suffix in ("bin", "idx", "json")]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks up processes in /proc")
def test_a_killed_worker_ends_the_run(tmp_path, models):
    _, process, workers = start_long_run(tmp_path, models)
    os.kill(workers[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr.splitlines()[-1].startswith("error: a worker process was killed")
    assert outputs(tmp_path) == []


def noting_at_once(line):
    """The command, noting its position after every block and keeping its work however short the run."""
    script = (
        "import runpy, sys, megacpt.data.tokens.work as work\nwork.SECONDS_BETWEEN_NOTES = 0.0\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return [sys.executable, "-c", script, *line[1:]]


def kill_in_the_middle(line, folder):
    """Start a run, and kill it once it has made three more notes."""
    process = subprocess.Popen(noting_at_once(line), env=ENVIRONMENT, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    journal = next(iter(folder.glob(".out*/journal.jsonl")), None)
    before = len(journal.read_bytes().splitlines()) if journal else 0
    while True:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        journal = next(iter(folder.glob(".out*/journal.jsonl")), None)
        if journal and len(journal.read_bytes().splitlines()) >= before + 3:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # its workers have ended, too


@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_three_times_the_same_command_goes_on_to_the_same_bytes(tmp_path, models, workers):
    texts = [f"the {'first ' * (i % 97)} and the last {i}" for i in range(90_000)]
    rows = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(rows[:10_000]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(rows[10_000:]).encode(), 1))
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]
    options = ["--dedup", "exact", "--workers", workers]
    line = command(tmp_path, models, *inputs, options=options)
    for _ in range(3):
        kill_in_the_middle(line, tmp_path)
    done = run(line)
    assert done.returncode == 0, done.stderr
    assert "going on after " in done.stderr
    assert outputs(tmp_path) == [f"out_text_document.{suffix}" for suffix in ("bin", "idx", "json")]
    assert run(command(tmp_path, models, *inputs, prefix="whole/new", options=options)).returncode == 0
    for suffix in ("bin", "idx", "json"):
        killed = (tmp_path / f"out_text_document.{suffix}").read_bytes()
        assert killed == (tmp_path / "whole" / f"new_text_document.{suffix}").read_bytes()


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, models):
    line, process, _ = start_long_run(tmp_path, models)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "documents are kept in " in stderr.splitlines()[-1]
    assert "the same command goes on" in stderr.splitlines()[-1]
    done = run(line)
    assert done.returncode == 0
    assert "going on after " in done.stderr
    assert len(IndexedDataset(tmp_path / "out_text_document")) == 6_000


def test_a_file_damaged_in_the_middle_is_named_and_the_files_before_it_are_kept(tmp_path, models):
    rows = "".join(json.dumps({"text": f"the first {i} and the last"}) + "\n" for i in range(160_000)).encode()
    whole = gzip.compress(rows)
    middle = len(whole) // 2
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "b.jsonl.gz").write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    line = command(tmp_path, models, tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz")
    done = run(noting_at_once(line))
    assert_refused(done, "b.jsonl.gz: the gzip file is damaged", "after line ", "fetch or write the file again")
    assert (
        "the same command goes on after them, or from the start of the first input file that has changed" in done.stderr
    )
    (tmp_path / "b.jsonl.gz").write_bytes(whole)
    done = run(line)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("going on after 2 documents that are done (1 of 2 input files")
    manifest = read_manifest(tmp_path / "out_text_document")
    assert manifest.documents == 160_002
    assert [file.sha256 for file in manifest.inputs] == [sha256_of(tmp_path / n) for n in ("a.jsonl", "b.jsonl.gz")]


def test_after_a_bad_row_the_same_command_with_skip_invalid_goes_on(tmp_path, models):
    rows = [json.dumps({"text": f"the first {i} and the last"}) + "\n" for i in range(80_000)]
    (tmp_path / "a.jsonl").write_text("".join([*rows, "{bad\n", *rows[:10]]))
    line = command(tmp_path, models, tmp_path / "a.jsonl")
    assert_refused(run(noting_at_once(line)), "a.jsonl:80001", "documents are kept in ")
    done = run([*line, "--skip-invalid"])
    assert done.returncode == 0, done.stderr
    assert "going on after " in done.stderr
    manifest = read_manifest(tmp_path / "out_text_document")
    assert (manifest.documents, manifest.skipped) == (80_010, {"invalid_json": 1})


def test_the_work_of_another_job_is_not_gone_on_with(tmp_path, models):
    rows = json.dumps({"text": "the first and the last"}) + "\n"
    (tmp_path / "a.jsonl").write_text(rows * 80_000 + "{bad\n")
    line = command(tmp_path, models, tmp_path / "a.jsonl")
    assert_refused(run(noting_at_once(line)), "documents are kept in ")
    done = run([*line, "--skip-invalid", "--min-chars", "5"])
    assert done.returncode == 0, done.stderr
    assert "holds the work of another job or of other inputs; starting afresh" in done.stderr
    assert len(IndexedDataset(tmp_path / "out_text_document")) == 80_000


def test_two_runs_into_one_output(tmp_path, models):
    line, process, _ = start_long_run(tmp_path, models)
    assert_refused(run(line), "work folder of this output is in use by another process")
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_file_may_not_grow_as_it_has_to(tmp_path, models, workers):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "the first and the last"}) + "\n" + GOOD * 50_000)
    line = command(tmp_path, models, tmp_path / "a.jsonl", options=["--workers", workers])
    limits = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))}
    assert_refused(
        run(line, **limits), ".out_text_document.partial", "cannot be written (File too large); choose another place"
    )
    assert outputs(tmp_path) == []
    assert run(line).returncode == 0


def test_more_workers_than_the_system_allows(tmp_path, models):
    (tmp_path / "a.jsonl").write_text(GOOD)
    line = command(tmp_path, models, tmp_path / "a.jsonl", options=["--workers", "40"])
    done = run(line, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)))
    assert_refused(
        done, "of 40 worker processes only ", " could be started (Too many open files); run again with fewer"
    )
    assert outputs(tmp_path) == []


@pytest.mark.parametrize(
    ("model", "words"), [("a" * 300, "File name too long"), ("empty", "not a SentencePiece model")]
)
@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_a_tokenizer_that_cannot_be_opened(tmp_path, models, model, words, kind):
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "empty").touch()
    line = [*command(tmp_path, models, tmp_path / "a.jsonl"), "--tokenizer-type", kind]
    done = run([*line, "--tokenizer-model", str(tmp_path / model)])
    assert_refused(done, words if kind[0] == "S" else words.replace("SentencePiece model", "Hugging Face"))


def test_an_output_whose_name_a_folder_has(tmp_path, models, run_here):
    (tmp_path / "a.jsonl").write_text(GOOD)
    for suffix in ("bin", "idx", "json"):
        folder = tmp_path / f"out_text_document.{suffix}"
        folder.mkdir()
        done = run_here(command(tmp_path, models, tmp_path / "a.jsonl", options=["--overwrite"]))
        assert_refused(done, f"out_text_document.{suffix}: cannot be written (Is a directory); choose another place")
        assert outputs(tmp_path) == [folder.name]
        folder.rmdir()


def test_names_that_are_not_utf_8_and_no_stderr(tmp_path, models):
    odd = os.fsdecode(b"caf\xe9.jsonl")
    (tmp_path / odd).write_text(GOOD)
    line = command(tmp_path, models, tmp_path / odd, prefix=os.fsdecode(b"\xe9_out"))
    done = run(line, preexec_fn=lambda: os.close(2))
    assert done.returncode == 0
    assert "\\udce9_out_text_document: 2 documents" in done.stdout
    (file,) = read_manifest(tmp_path / os.fsdecode(b"\xe9_out_text_document")).inputs
    assert file.name == odd


def test_a_folder_that_nothing_can_be_written_to(tmp_path, models):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "closed").mkdir(mode=0o500)
    assert_refused(run(command(tmp_path, models, tmp_path / "a.jsonl", prefix="closed/out")), "cannot be made")


def test_shards_of_a_job_array_merged(tmp_path, models):
    merger = [sys.executable, str(ROOT / "tools" / "merge_datasets.py")]
    rows = [json.dumps({"text": f"the first {i % 700} and the last"}) + "\n" for i in range(1_000)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    options = ["--dedup", "exact", "--min-chars", "3"]
    whole = run(command(tmp_path, models, tmp_path / "a.jsonl", options=options))
    assert "; 300 duplicates; tokens per document: median " in whole.stdout
    for shard in ("0/3", "1/3", "2/3"):
        line = command(tmp_path, models, tmp_path / "a.jsonl", prefix="part", options=[*options, "--shard", shard])
        assert run(line).returncode == 0
    parts = sorted(str(path) for path in tmp_path.glob("part*.bin"))
    assert [Path(part).name for part in parts] == [f"part_text_document.shard-0000{i}-of-00003.bin" for i in range(3)]
    output = ["--output-prefix", str(tmp_path / "merged")]
    done = run([*merger, "--input", *parts[:2], *output])
    assert_refused(done, "of its 3 shards 1 are missing: --shard 2/3")
    done = run([*merger, "--input", *parts, *output])
    assert done.returncode == 0, done.stderr
    assert "700 documents (0 empty, 300 duplicates dropped)" in done.stdout
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"merged.{suffix}").read_bytes() == (tmp_path / f"out_text_document.{suffix}").read_bytes()
