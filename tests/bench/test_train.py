"""The contestants themselves, in processes of their own, on a model of two layers.

What has been started here once is forked from then on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from megacpt.bench import checkpoint, train, train_case
from megacpt.bench.contestant import Result, read_result
from megacpt.bench.processes import TimeUp, run_module
from megacpt.bench.rows import OURS, Recorder
from megacpt.bench.train_case import GPU_CASES, TrainCase
from megacpt.bench.train_ours import use_stock_specs
from megacpt.config.architecture import Architecture
from megacpt.config.tree import Model
from megacpt.errors import UserError
from megacpt.model import build
from tests.commands import forked

SMALL = {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 96, "kv_channels": 8, "vocab_size": 500}
CASES = MappingProxyType({"small": TrainCase("small", "tiny", 32, 2, 4, SMALL)})

CONTESTANTS = {OURS, "megatron-core's specs", "Hugging Face Trainer"}


ON_A_GPU = train.GPU_CONTESTANTS


@dataclass(frozen=True)
class Race:
    """What the real contestants did, each in a process of its own: rows, and results by their command."""

    recorder: Recorder
    folder: Path
    results: Mapping[tuple[str, ...], Result]

    @property
    def config(self) -> Path:
        return self.folder / "small" / "run.yaml"


@pytest.fixture(scope="module")
def race(tmp_path_factory):
    """Run once: a contestant needs ten seconds only to start."""
    folder, recorder, results, turn = (
        tmp_path_factory.mktemp("race"),
        Recorder("here", [], "now", "abc"),
        {},
        train._turn,
    )

    def noted(contestant, *words):
        results[contestant] = turn(contestant, *words)
        return results[contestant]

    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        patch.setattr(train, "_turn", noted)
        train.measure(recorder, ["small"], train.Run(steps=5, rounds=1, dtype="fp32"), folder)
    return Race(recorder, folder, results)


@pytest.fixture(scope="module")
def ceilings():
    return train.measure_ceilings(torch.device("cpu"), torch.float32)


def make_small(patch):
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setattr(train, "CPU_CASES", CASES)
    patch.setattr(train, "GPU_CASES", CASES)
    patch.setattr(train, "GPU_CONTESTANTS", {})


@pytest.fixture(autouse=True)
def small(monkeypatch, ceilings):
    make_small(monkeypatch)
    monkeypatch.setattr(train, "measure_ceilings", lambda *_: ceilings)


def run_forked(module, *words, limit=None):
    done = forked("-m", module, *words)
    assert done.returncode == 0, done.stderr


def values(recorder, unit):
    return {row.tool: row.value for row in recorder.rows if row.unit == unit}


def test_keys_of_the_contestants_on_a_gpu_are_keys(race, tmp_path):
    """Those that a CPU has as well train here, and the same."""
    from megacpt.config.load import load_config

    ours = [flags for module, *flags in ON_A_GPU.values() if module == train.TRAINER]
    assert len(ours) == 4
    for flags in ours:
        load_config(str(race.config), flags)
    flags = [flag for more in ours for flag in more if "fp8" not in flag]
    run_forked(train.TRAINER, race.config, tmp_path / "result.json", *flags, f"save.dir={tmp_path / 'run'}")
    found = read_result(tmp_path / "result.json").losses
    assert found == pytest.approx(race.results[train.CONTESTANTS[OURS]].losses, rel=1e-5)


def test_all_train_the_same_and_each_has_its_speed(race):
    rates = values(race.recorder, "tokens/s")
    assert rates.keys() == CONTESTANTS
    assert all(rate > 0 for rate in rates.values()), race.recorder.rows
    assert values(race.recorder, "GiB peak").keys() == CONTESTANTS


def test_who_trains_something_else_has_no_speed(race, tmp_path, monkeypatch):
    """Their real losses, judged more strictly."""
    monkeypatch.setattr(train, "write_case", lambda *_: race.config)
    monkeypatch.setattr(train, "_turn", lambda contestant, *_: race.results[contestant])
    monkeypatch.setitem(train.TOLERANCE, "fp32", 0.0)
    recorder = Recorder("here", [], "now", "abc")
    train.measure(recorder, ["small"], train.Run(steps=5, rounds=1, dtype="fp32"), tmp_path)
    rates = values(recorder, "tokens/s")
    assert rates[OURS] > 0
    assert rates["Hugging Face Trainer"] == 0
    (row,) = (row for row in recorder.rows if row.tool == "Hugging Face Trainer")
    assert "other losses" in row.note


def test_nothing_is_begun_when_the_time_is_up(tmp_path):
    recorder = Recorder("here", [], "now", "abc")
    train.measure(recorder, ["small"], train.Run(steps=4, rounds=1, dtype="fp32", deadline=0.0), tmp_path)
    (row,) = (row for row in recorder.rows if row.unit == "tokens/s")
    assert row.note == "not measured: the time was up"
    assert not (tmp_path / "small").exists()


def test_a_contestant_that_hangs_is_ended(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text("import time; print('here', flush=True); time.sleep(60)")
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(TimeUp, match=r"not done after 2 s: here$"):
        train._turn(("hangs",), tmp_path / "run.yaml", tmp_path, 2.0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rounds", [1, 2])
def test_who_does_not_end_in_time_is_told_and_the_others_keep_their_rows(tmp_path, monkeypatch, rounds):
    told = []

    def ends(module, config, path, *flags, limit):
        assert limit > 0
        if module != train.TRAINER:
            raise TimeUp("not done")
        told.append([row.tool for row in recorder.rows if row.unit == "tokens/s"])
        Result([1.0] * 5, [0.5] * 5).write(path)

    monkeypatch.setattr(train, "run_module", ends)
    monkeypatch.setattr(train, "write_case", lambda case, folder, *_: folder.mkdir() or folder / "run.yaml")
    recorder = Recorder("here", [], "now", "abc")
    train.measure(recorder, ["small"], train.Run(5, rounds, "fp32"), tmp_path)
    assert told[-1] == ([OURS] if rounds == 1 else ["Hugging Face Trainer", OURS])
    assert values(recorder, "tokens/s") == {OURS: 256, "megatron-core's specs": 256, "Hugging Face Trainer": 0}
    (row,) = (row for row in recorder.rows if row.tool == "Hugging Face Trainer")
    assert row.note == "not measured: the time was up"


def test_a_case_whose_own_steps_take_too_long_is_told(tmp_path, monkeypatch):
    def late(*_, **__):
        raise TimeUp("not done")

    monkeypatch.setattr(train, "write_case", late)
    recorder = Recorder("here", [], "now", "abc")
    train.measure(recorder, ["small"], train.Run(5, 1, "fp32"), tmp_path)
    (row,) = (row for row in recorder.rows if row.unit == "tokens/s")
    assert (row.tool, row.value, row.note) == (OURS, 0, "not measured: the time was up")


def test_a_case_that_ours_fails_ends_the_run_when_the_others_are_measured(tmp_path, monkeypatch):
    begun = []

    def breaks(case, *_):
        begun.append(case.name)
        raise UserError("exit code 1: out of memory")

    monkeypatch.setattr(train, "write_case", breaks)
    recorder = Recorder("here", [], "now", "abc")
    with pytest.raises(UserError, match="out of memory"):
        train.measure(recorder, ["small", "small"], train.Run(5, 1, "fp32"), tmp_path)
    assert begun == ["small", "small"]
    assert [row.note for row in recorder.rows if row.unit == "tokens/s"] == [
        "did not run: exit code 1: out of memory"
    ] * 2


def test_megatron_cores_local_specs_hold_nothing_of_transformer_engine(monkeypatch):
    """Which is in `LayerNormImpl` wherever it imports."""
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    monkeypatch.setattr(build, "block_spec", build.block_spec)
    monkeypatch.setattr(transformer_block, "LayerNormImpl", object)
    use_stock_specs()
    spec = build.block_spec(Architecture(**CASES["small"].fields), Model(), 2, engine=False)
    assert spec.layer_norm is WrappedTorchNorm
    assert len(spec.layer_specs) == 2


def test_peak_memory_is_that_of_the_steps_after_the_first(monkeypatch):
    resets, result = [], Result()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(len(result.seconds)))
    for seconds in (3.0, 1.0, 1.0):
        result.step_took(seconds)
    assert (resets, result.seconds) == ([1], [3.0, 1.0, 1.0])


def test_the_slowest_contestant_is_last():
    assert list(ON_A_GPU)[-1] == "HF Trainer, torch.compile"


def test_checkpoints(tmp_path, monkeypatch):
    """One case is on disk at a time, and of that one form."""

    def run(module, config, *words, limit):
        run_module(module, config, *words, limit=limit)
        left = {path.name for path in (config.parent / "run").iterdir()}
        assert {"state.pt", "checkpoints"} & left == {"state.pt"}

    monkeypatch.setattr(checkpoint, "run_module", run)
    monkeypatch.setattr(train_case, "run_module", run_forked)
    recorder = Recorder("here", [], "now", "abc")
    checkpoint.measure(recorder, ["small"], "fp32", tmp_path)
    for unit in ("GB/s saved", "GB/s loaded", "GB on disk"):
        assert {tool: value > 0 for tool, value in values(recorder, unit).items()} == {OURS: True, "torch.save": True}
    assert list(tmp_path.iterdir()) == []


def test_no_checkpoint_is_begun_when_the_time_is_up(tmp_path):
    recorder = Recorder("here", [], "now", "abc")
    checkpoint.measure(recorder, ["small"], "fp32", tmp_path, deadline=0.0)
    (row,) = recorder.rows
    assert (row.tool, row.value, row.note) == (OURS, 0, "not measured: the time was up")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("on_gpu", "expected"), [(True, ["smollm2-135m", "1b"]), (False, ["small"])])
def test_checkpoints_of_every_case_only_where_they_are_small(monkeypatch, on_gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    assert checkpoint.usual_cases() == expected
    assert {*checkpoint.usual_cases(), checkpoint.SMALLEST} <= {*GPU_CASES, *CASES}


def test_every_case_of_a_gpu_has_fused_attention():
    """FlashAttention and cuDNN take heads of a multiple of eight channels."""
    assert all(case.fields["kv_channels"] % 8 == 0 for case in GPU_CASES.values())


def test_an_unknown_case_is_named():
    with pytest.raises(UserError, match="--cases huge: no such case on this device; it has small"):
        train.chosen(["huge"])
