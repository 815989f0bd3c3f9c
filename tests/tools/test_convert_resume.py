"""tools/convert.py killed with SIGKILL half-way: the same command goes on, to the bytes of an undisturbed one."""

import pickle
import signal
from pathlib import Path

import pytest

from megacpt.model.hf.unfinished import Report
from megacpt.train.exchange import HFOutput, export_checkpoint
from tests.commands import forked, forked_ranks
from tests.conftest import REPOSITORY
from tests.model.hf.models import make_model
from tests.model.hf.test_unfinished import import_here
from tests.ranks import run_ranks

TOOL = REPOSITORY / "tools" / "convert.py"
DIE = "import os, signal\ndie = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
IN_THE_THIRD_FILE = """
import safetensors.torch
write, files = safetensors.torch.save_file, []
def save_file(tensors, path, **options):
    files.append(path)
    if len(files) < 3:
        return write(tensors, path, **options)
    open(path, "wb").write(b"half a file")
    die()
safetensors.torch.save_file = save_file
"""
BETWEEN_TENSORS_OF_THE_CHECKPOINT = """
import functools
from megatron.core.dist_checkpointing.strategies import filesystem_async as writer
write, items = writer._write_item, []
@functools.wraps(write)
def write_item(transforms, stream, *rest, **options):
    stream.flush()
    items.append(rest)
    return write(transforms, stream, *rest, **options) if len(items) < 4 else die()
writer._write_item = write_item
"""
IN_THE_GATE = """
import megacpt.model.hf.reference as reference
reference._units = lambda *arguments: die()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("source") / "model", "llama3")


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported checkpoint and its export."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(import_here, 1, model, folder / "checkpoint")
    output = HFOutput(folder / "out", shard_bytes=100_000)
    export_checkpoint(folder / "checkpoint" / "release", output, Report())
    return folder


def export_arguments(folder: Path, output: Path) -> tuple[object, ...]:
    return ("export", "--checkpoint", folder / "checkpoint", "--output", output, "--shard-gb", "0.0001")


def killed(where: str, *arguments: object) -> None:
    """The tool in a process that `where` ends with SIGKILL."""
    ended = forked(TOOL, *arguments, before=DIE + where)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("model-*.safetensors")}


def test_an_export_goes_on_with_the_missing_files(undisturbed: Path, tmp_path: Path) -> None:
    output, partial = tmp_path / "out", tmp_path / ".out.partial"
    command = export_arguments(undisturbed, output)
    killed(IN_THE_THIRD_FILE, *command)
    finished = identities(partial)
    assert len(finished) == 2
    assert not output.exists()
    ranks = [rank.wait() for rank in forked_ranks(2, TOOL, *command)]
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    total = len(list(output.glob("model-*.safetensors")))
    said = "".join(rank.stdout for rank in ranks)
    assert said.count("resuming:") == 1
    assert f"resuming: 2 of {total} weight files of {output} are finished\n" in said
    assert finished.items() <= identities(output).items()
    assert contents(output) == contents(undisturbed / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_import_keeps_the_verdict_of_the_gate(model: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "checkpoint"
    command = ("import", "--hf", model, "--output", output)
    killed(IN_THE_GATE, *command)
    assert not (output / "release").exists()
    killed(BETWEEN_TENSORS_OF_THE_CHECKPOINT, *command)  # the gate is passed here, and only here
    assert not (output / "release").exists()
    again = forked(TOOL, *command)
    assert again.returncode == 0, again.stderr
    assert f"resuming: the weights of {model} have passed the gate, which is not repeated\n" in again.stdout
    assert "gate passed: on 256 tokens" in again.stdout
    found, expected = contents(output), contents(undisturbed / "checkpoint")
    # Its metadata name the folder and draw an identifier; what they say of tensors has to be the same.
    described = [pickle.loads(files.pop("release/.metadata")) for files in (found, expected)]
    assert described[0].storage_data == described[1].storage_data
    assert described[0].state_dict_metadata == described[1].state_dict_metadata
    assert found == expected
