"""Tables of launches: the lookup, what is committed, what a tuner writes; and which form of an operation runs."""

import os
import stat
from pathlib import Path

import pytest
import torch
import triton

from megacpt_kernels import launch
from megacpt_kernels.dispatch import INTERPRETED, multiprocessors, runs_triton
from megacpt_kernels.launch import Entry, Launch, choose

SMALL, LARGE, TUNED = Launch(1024, 4), Launch(4096, 8), Launch(2048, 2, stages=3)
DEFAULT = (Entry("op", 4096, 2, LARGE), Entry("op", 1024, 2, SMALL), Entry("other", 8192, 2, TUNED))
OPERATIONS = {
    "rms_norm_forward",
    "rms_norm_backward",
    "rope",
    "swiglu_forward",
    "swiglu_backward",
    "cross_entropy_statistics",
    "cross_entropy_gradient",
    "token_losses",
}


@pytest.mark.parametrize(
    ("width", "itemsize", "expected"),
    [(1, 2, SMALL), (1024, 4, SMALL), (1025, 2, LARGE), (3000, 2, TUNED), (3000, 4, LARGE), (100_000, 2, LARGE)],
)
def test_a_tuned_row_of_the_class_comes_first(width: int, itemsize: int, expected: Launch) -> None:
    assert choose((Entry("op", 4096, 2, TUNED),) if width != 1025 else (), DEFAULT, "op", width, itemsize) == expected


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"add a row to configs/default\.json"):
        choose((), DEFAULT, "unknown", 1, 2)


def test_every_committed_table_is_whole() -> None:
    for path in sorted(launch.FOLDER.glob("*.json")):
        for entry in launch.read_table(path):
            values = (entry.width, entry.launch.block, entry.launch.warps)
            assert entry.op in OPERATIONS
            assert all(value == triton.next_power_of_2(value) for value in values)
            assert entry.launch.warps <= 32
    assert {entry.op for entry in launch.read_table(launch.FOLDER / "default.json")} == OPERATIONS


def test_a_device_has_its_own_file() -> None:
    assert launch.table_name("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3.json"
    assert launch.launch_for("rope", 128, 2, torch.device("cpu")).block > 0


def test_tables_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    assert launch.read_table(path) == ()
    launch.write_table(path, DEFAULT)
    assert sorted(launch.read_table(path), key=str) == sorted(DEFAULT, key=str)
    assert [file.name for file in tmp_path.iterdir()] == ["device.json"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_table_can_be_read_by_whom_the_umask_lets(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        launch.write_table(tmp_path / "device.json", DEFAULT)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "device.json").stat().st_mode) == mode


def test_the_fastest_launch_that_fits_is_taken() -> None:
    def run(option: Launch) -> Launch:
        if option.block > 4096:
            raise triton.runtime.errors.OutOfResources(option.block, 4096, "shared memory")
        return option

    options = launch.candidates(LARGE)
    assert {LARGE.block * 4, LARGE.block // 2} < {option.block for option in options}
    small = launch.candidates(Launch(1024, 4))
    assert len(small) == 12
    assert {(option.stages, option.per_sm) for option in small} == {(1, 1)}
    best = launch.tune(run, options, lambda call: abs(call().block - 2000) + call().stages + 1 / call().warps)
    assert (best.block, best.stages, best.warps) == (2048, 1, 16)
    with pytest.raises(ValueError, match="none of the launches fits"):
        launch.tune(run, [Launch(8192, 4)], lambda call: call().block)


def test_the_device_and_the_variable_say_what_runs() -> None:
    assert (os.environ.get("TRITON_INTERPRET") == "1") == INTERPRETED
    assert runs_triton(torch.empty(1), torch.empty(2)) == INTERPRETED
    assert multiprocessors(torch.device("cpu")) == 4
    for tensors in ([torch.empty(1, device="meta")], [torch.empty(1), torch.empty(1, device="meta")]):
        with pytest.raises(ValueError, match="tensors of one device, cuda or cpu"):
            runs_triton(*tensors)
