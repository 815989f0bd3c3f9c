"""What an interrupted export leaves, and when it is used again: for the very same job, and for no other."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist

from megacpt.config.tree import Model
from megacpt.errors import DiskError, UserError
from megacpt.files import exclusive
from megacpt.model.hf.unfinished import Report, describe_files, lock_of, take_up
from megacpt.runtime.setup import Layout, setup
from megacpt.train import exchange
from megacpt.train.exchange import Conversion, HFOutput, export_checkpoint, import_model
from megacpt.train.origin import open_hf
from tests.model.hf.models import make_model, tensors_of
from tests.ranks import run_ranks

SHARD_BYTES = 100_000


def import_here(source: Path, output: Path, gate: bool = False, stopped: bool = False) -> list[str]:
    """What an import says of an earlier one and of the gate; `stopped` interrupts it before it saves."""
    setup(Layout(1), seed=0, threads=1)
    said: list[str] = []
    report = Report(resumed=lambda _, sentence: said.append(sentence))
    arguments = open_hf(source), Model(), Conversion(output, gate=gate), report
    if stopped:
        exchange.save_weights = partial(stop, [0], 1)  # type: ignore[assignment]  # this process is the test's own
        with pytest.raises(KeyboardInterrupt):
            import_model(*arguments)
        return said
    _, verdict = import_model(*arguments)
    return [*said, str(verdict).split(":")[0]]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    make_model(folder / "model", "tied")
    run_ranks(import_here, 1, folder / "model", folder / "base")
    return folder / "base" / "release"


@pytest.fixture
def checkpoint(imported: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own to change."""
    return shutil.copytree(imported, tmp_path / "base" / "release")


def stop(left: list[int], count: int, *_arguments: object) -> None:
    """Interrupt after some parameters."""
    left[0] -= count
    if left[0] < 0:
        raise KeyboardInterrupt


def interrupted(checkpoint: Path, output: HFOutput) -> dict[str, int]:
    """An export that is stopped at its end; inodes of the files that it leaves."""
    left = [sum(t.numel() for t in tensors_of(checkpoint.parents[1] / "all").values()) - 1]
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(checkpoint, output, Report(partial(stop, left)))
    return inodes(hidden(output))


def hidden(output: HFOutput) -> Path:
    return output.folder.with_name(f".{output.folder.name}.partial")


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}


def export(checkpoint: Path, output: HFOutput) -> tuple[list[str], list[int]]:
    """Sentences and counts of parameters that an export reports as finished before."""
    sentences, counts, done = [], [], []
    report = Report(done.append, lambda count, sentence: (counts.append(count), sentences.append(sentence)))
    export_checkpoint(checkpoint, output, report)
    total = sum(tensor.numel() for tensor in tensors_of(output.folder).values())
    assert sum(done) + sum(counts) == total
    return sentences, counts


@pytest.fixture
def output(checkpoint: Path, tmp_path: Path) -> HFOutput:
    """Where to, with an undisturbed export beside it."""
    output = HFOutput(tmp_path / "out", shard_bytes=SHARD_BYTES)
    export(checkpoint, replace(output, folder=tmp_path / "all"))
    return output


def test_the_same_job_goes_on(checkpoint: Path, output: HFOutput, tmp_path: Path) -> None:
    left = interrupted(checkpoint, output)
    assert len(left) > 2
    sentences, _ = export(checkpoint, output)
    assert sentences == [
        f"resuming: {len(left)} of {len(left) + 1} weight files of {output.folder} are finished",
    ]
    assert left.items() <= inodes(output.folder).items()
    for path in (tmp_path / "all").iterdir():
        assert (output.folder / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "base", "out"]


@pytest.mark.parametrize("change", ["dtype", "shards", "touched", "rewritten in place, time set back", "version"])
def test_another_job_starts_afresh(
    checkpoint: Path, output: HFOutput, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = interrupted(checkpoint, output)
    stored = next(checkpoint.glob("*.distcp"))
    kept = {path: open(path, "rb") for path in hidden(output).iterdir()}  # noqa: SIM115, so that no inode is used again
    if change == "dtype":
        output = replace(output, dtype=torch.bfloat16)
    elif change == "shards":
        output = replace(output, shard_bytes=2 * SHARD_BYTES)
    elif change == "version":
        monkeypatch.setattr("megacpt.__version__", "next")
    elif change == "touched":
        os.utime(stored)
    else:
        before = stored.stat()
        with open(stored, "r+b") as handle:
            handle.seek(-1, os.SEEK_END)
            last = handle.read(1)
            handle.seek(-1, os.SEEK_END)
            handle.write(last)
        os.utime(stored, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert stored.stat().st_mtime_ns == before.st_mtime_ns
    assert export(checkpoint, output) == ([], [])
    assert not set(left.values()) & set(inodes(output.folder).values())
    for handle in kept.values():
        handle.close()


def test_a_file_that_is_not_whole_is_written_again(checkpoint: Path, output: HFOutput, tmp_path: Path) -> None:
    left = interrupted(checkpoint, output)
    first, second, *_ = sorted(left)
    os.truncate(hidden(output) / first, 1000)
    safetensors.torch.save_file({"other": torch.ones(2)}, hidden(output) / second)
    (hidden(output) / "stray").write_text("left by another version")
    sentences, _ = export(checkpoint, output)
    assert sentences[0].startswith(f"resuming: {len(left) - 2} of ")
    before, after = tensors_of(tmp_path / "all"), tensors_of(output.folder)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (output.folder / "stray").exists()


def test_a_verdict_is_of_one_source(imported: Path, tmp_path: Path) -> None:
    source = shutil.copytree(imported.parents[1] / "model", tmp_path / "model")
    output = tmp_path / "base"
    assert run_ranks(import_here, 1, source, output, True, True) == [[]]
    sentence = f"resuming: the weights of {source} have passed the gate, which is not repeated"
    assert run_ranks(import_here, 1, source, output, True, True) == [[sentence]]
    os.utime(next(source.glob("*.safetensors")))
    assert run_ranks(import_here, 1, source, output, True) == [["gate passed"]]
    assert sorted(path.name for path in output.iterdir()) == [
        "latest_checkpointed_iteration.txt",
        "release",
    ]


def damage(checkpoint: Path) -> None:
    """Ruin the second half of the stored tensors."""
    path = next(checkpoint.glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = b"\0" * (len(data) - len(data) // 2)
    path.write_bytes(data)


def failing_export(checkpoint: Path, output: HFOutput) -> str:
    with pytest.raises(UserError) as caught:
        export_checkpoint(checkpoint, output, Report())
    dist.barrier()
    return str(caught.value)


def test_a_damaged_checkpoint_leaves_nothing_behind(checkpoint: Path, output: HFOutput, tmp_path: Path) -> None:
    interrupted(checkpoint, output)
    damage(checkpoint)
    first, second = run_ranks(failing_export, 2, checkpoint, output)
    assert first == second
    assert first.endswith("cannot be read; the checkpoint is damaged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "base"]


def test_a_full_disk_leaves_what_is_finished(
    checkpoint: Path, output: HFOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = safetensors.torch.save_file
    message = "Error while serializing: I/O error: No space left on device (os error 28)"  # the library's own

    def save_file(tensors: dict[str, torch.Tensor], path: Path, **options: object) -> None:
        if path.name.startswith(".model-00003"):
            raise safetensors.SafetensorError(message)
        write(tensors, path, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(DiskError, match=r"out: the disk is full; free space and run the same command again"):
        export(checkpoint, output)
    left = inodes(hidden(output))
    assert len(left) == 2
    assert not lock_of(hidden(output)).exists()
    monkeypatch.undo()
    assert export(checkpoint, output)[0][0].startswith("resuming: 2 of ")
    assert left.items() <= inodes(output.folder).items()


def test_two_at_once(checkpoint: Path, output: HFOutput) -> None:
    left = interrupted(checkpoint, output)
    with (
        exclusive(lock_of(hidden(output)), "the place"),
        pytest.raises(UserError, match=r"the export to .*out is in use by another process; wait"),
    ):
        export(checkpoint, output)
    assert inodes(hidden(output)) == left
    assert export(checkpoint, output)[0]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    file.write_text("text")
    job = {"files": describe_files([file]), "shape": (1, 2), "none": None}
    assert not take_up(folder, job)
    (folder / "finished").touch()
    assert take_up(folder, job)
    assert (folder / "finished").exists()
    (folder / "job.json").write_text(json.dumps(job)[:-5])
    assert not take_up(folder, job)
    assert not (folder / "finished").exists()
