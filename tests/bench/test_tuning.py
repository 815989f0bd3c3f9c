"""What is tuned, and the table that grows with each measurement, with a clock that counts."""

import shutil
import time

import pytest
import torch

from megacpt.bench import tuning
from megacpt.errors import UserError
from megacpt_kernels import launch
from megacpt_kernels.launch import Launch, candidates, launch_for, read_table, width_class

CPU = torch.device("cpu")
WORKS = [("rms_norm_forward", 2048), ("swiglu_forward", 1536), ("rope", 64)]


def test_every_operation_with_a_launch_is_tuned_once_in_a_class():
    with torch.device("meta"):
        found = [(name, width_class(width)) for name, width, _ in tuning.works(torch.device("meta"))]
    assert len(set(found)) == len(found)
    assert {name for name, _ in found} == {
        "rms_norm_forward",
        "rms_norm_backward",
        "swiglu_forward",
        "swiglu_backward",
        "rope",
        "cross_entropy_statistics",
        "cross_entropy_gradient",
    }


def test_launches_that_run_alike_are_measured_once():
    start = Launch(2048, 4, stages=2, per_sm=2)
    found = tuning.options("rms_norm_backward", start, 3000)
    assert {option.block for option in found} == {4096, 8192}
    assert len(set(found)) == len(found) == len(candidates(start)) // 2
    assert tuning.options("swiglu_forward", start, 3000) == candidates(start)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copy(launch.FOLDER / "default.json", tmp_path)
    monkeypatch.setattr(launch, "FOLDER", tmp_path)
    launch_for.cache_clear()
    yield tmp_path
    launch_for.cache_clear()


def use_works(monkeypatch, measured, breaks=None):
    def run(operation, option):
        if operation == breaks:
            raise RuntimeError("cut off")
        measured.append(operation)
        return option

    works = [(name, width, lambda option, name=name: run(name, option)) for name, width in WORKS]
    monkeypatch.setattr(tuning, "works", lambda device: iter(works))


def test_a_run_that_is_cut_off_goes_on(folder, monkeypatch):
    measured = []
    use_works(monkeypatch, measured, breaks="rope")
    with pytest.raises(RuntimeError, match="cut off"):
        tuning.tune_all(CPU, milliseconds=lambda call: call().warps)
    table = read_table(folder / "interpreter.json")
    assert [entry.op for entry in table] == ["rms_norm_forward", "swiglu_forward"]
    assert [entry.launch.warps for entry in table] == [2, 4]
    use_works(monkeypatch, measured := [])
    path = tuning.tune_all(CPU, milliseconds=lambda call: -call().warps)
    assert set(measured) == {"rope"}
    assert [entry.op for entry in read_table(path)] == ["rms_norm_forward", "rope", "swiglu_forward"]
    assert {entry.op: entry.launch for entry in read_table(path)}["swiglu_forward"] == table[1].launch
    assert launch_for("rope", 64, 2, CPU).warps == 2


def test_nothing_is_tuned_when_the_time_is_up(folder, monkeypatch):
    use_works(monkeypatch, measured := [])
    assert not tuning.tune_all(CPU, deadline=time.monotonic()).exists()
    assert measured == []


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(folder, monkeypatch):
    use_works(monkeypatch, measured := [])
    monkeypatch.setattr(launch, "FOLDER", folder / "nowhere")
    with pytest.raises(UserError, match=r"nowhere/interpreter\.json: cannot be written"):
        tuning.tune_all(CPU)
    assert measured == []
