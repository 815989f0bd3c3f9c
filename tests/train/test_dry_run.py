"""The dry run, through the command that a user types."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megacpt.config.load import load_config
from megacpt.data.mixture.ledger import table
from megacpt.data.tokens.indexed import write_dataset
from megacpt.train.__main__ import main
from megacpt.train.dry_run import evaluation_cost, flops, size
from megacpt.train.memory import checkpoint_bytes, stage_state
from megacpt.train.peak import stage_peak
from megacpt.train.plan import Plan, fingerprint
from megacpt.train.planning import make_plan

REPOSITORY = Path(__file__).resolve().parents[2]
LARGE = [
    "model.preset=llama3-70b",
    "model.vocab_size=128256",
    "model.tensor_model_parallel_size=8",
    "model.pipeline_model_parallel_size=4",
    "model.sequence_parallel=true",
    "precision.dtype=bf16",
    "optimizer.use_distributed_optimizer=true",
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration file over three small corpora; the run folder does not exist."""
    numbers = np.random.default_rng(0)
    for name, documents in {"medical": 60, "general": 90, "valid": 20}.items():
        lengths = numbers.integers(1, 90, documents)
        tokens = (numbers.integers(0, 500, length) for length in lengths)
        write_dataset(tmp_path / name, np.dtype(np.uint16), tokens)
    tree: dict[str, Any] = {
        "precision": {"dtype": "fp32"},
        "model": {"preset": "tiny", "vocab_size": 500},
        "data": {
            "seq_length": 32,
            "sources": {
                "medical": {"path": str(tmp_path / "medical"), "epochs": 2},
                "general": {"path": str(tmp_path / "general"), "weight": 0.25},
            },
        },
        "train": {"micro_batch_size": 1, "global_batch_size": 8},
        "optimizer": {"lr": 3e-4, "min_lr": 3e-5},
        "schedule": {"lr_warmup_fraction": 0.1},
        "eval": {"sets": {"medical": str(tmp_path / "valid")}, "at": [0, 1, 2, 4, 999], "every": 5},
        "save": {"dir": str(tmp_path / "run"), "interval": 7, "keep_last": 2},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def plan_of(config: Path, *overrides: str, world_size: int = 1) -> Plan:
    return make_plan(load_config(config, overrides), world_size, on_gpu=False)


def command(config: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The real command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "megacpt.train", "--config", str(config), *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def report(config: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """report(*arguments): what the dry run prints."""

    def run(*arguments: str) -> str:
        assert main(["--config", str(config), "--dry-run", *arguments]) == 0
        return capsys.readouterr().out

    return run


def test_a_large_model_on_64_ranks_is_planned_by_one_small_process(config: Path) -> None:
    done = command(config, "--dry-run", "--world-size", "64", *LARGE, WORLD_SIZE="2", RANK="0")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 << 20  # KiB
    assert "70,553,706,496 parameters, bfloat16" in done.stdout
    assert "64 = TP 8 x PP 4 x DP 2, sequence parallel, distributed optimizer" in done.stdout
    plan = plan_of(config, *LARGE, world_size=64)
    setting = plan.setting
    for stage in range(4):
        (row,) = re.findall(rf"^{stage} +20 .*$", done.stdout, re.MULTILINE)
        state = stage_state(setting, stage)
        assert re.split(" {2,}", row)[2:6] == [
            f"{state.parameters:,}",
            *map(size, (state.weights, state.gradients, state.optimizer)),
        ]
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dry-run", "--world-size", "40", *LARGE], ["40 processes", "TP 8 x PP 4", "multiple of 32"]),
        (["--dry-run", "--world-size", "0"], ["--world-size 0", "at least 1"]),
        (["--dry-run", "--world-size", "-2"], ["--world-size -2", "at least 1"]),
        (["--world-size", "2"], ["--world-size goes with --dry-run"]),
        (["--device", "gpu"], ["--device goes with --dry-run"]),
        (["model.transformer_impl=transformer_engine"], ["transformer_impl transformer_engine needs a GPU", "CPU"]),
        (["--dry-run", "model.fp8=hybrid"], ["model.fp8 hybrid", "transformer_impl"]),
        (["--dry-run", "--world-size", "3"], ["global_batch_size 8", "data-parallel size 3"]),
        (
            [
                "--dry-run",
                "--world-size",
                "4",
                "model.pipeline_model_parallel_size=2",
                "model.virtual_pipeline_model_parallel_size=1",
            ],
            ["virtual", "null"],
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert main(["--config", str(config), *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert all(word in output.err for word in words), output.err
    assert not (config.parent / "run").exists()


def test_the_report_shows_the_plan(config: Path, report: Callable[..., str]) -> None:
    text, plan = report(), plan_of(config)
    assert table(plan.mixture) in text
    assert f"fingerprint {fingerprint(plan.mixture.fingerprint())}" in text
    assert f"{plan.mixture.steps:,} of 8 samples x 32 tokens" in text
    assert f"warm-up over {0.1 * plan.mixture.steps:g} iterations, from 0 to the peak 0.0003" in text
    assert f"cosine to the floor 3e-05 at iteration {plan.mixture.steps}" in text
    assert "at iteration 0, from fresh weights" in text
    assert max(map(len, text.splitlines())) <= 130


def test_ranks_change_memory_and_nothing_that_is_read(report: Callable[..., str]) -> None:
    one = report()
    four = report(
        "--world-size", "4", "model.pipeline_model_parallel_size=2", "optimizer.use_distributed_optimizer=true"
    )
    data = [next(line for line in text.splitlines() if line.startswith("data ")) for text in (one, four)]
    assert data[0] == data[1]
    assert "1 = TP 1 x PP 1 x DP 1" in one
    assert "4 = TP 1 x PP 2 x DP 2" in four


def test_stages_that_hold_the_same_share_a_row(report: Callable[..., str]) -> None:
    micro_batches_fit = ["--world-size", "4", "model.pipeline_model_parallel_size=4", "train.micro_batch_size=8"]
    assert "\n1-2 " in report(*micro_batches_fit)


def test_world_size_comes_from_torchrun_unless_given_and_one_rank_speaks(
    report: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 = TP 1 x PP 1 x DP 2" in report()
    assert "8 = TP 1 x PP 1 x DP 8" in report("--world-size", "8")
    monkeypatch.setenv("RANK", "1")
    assert report() == ""


def test_a_plan_is_for_the_device_that_is_here_or_named_or_needed(report: Callable[..., str]) -> None:
    here = report()
    assert "layers       local (on a CPU)" in here
    assert "by pipeline stage, on a CPU" in here
    assert "float32" in here
    named = report("--device", "gpu", "model.transformer_impl=local", "precision.dtype=null")
    assert "by pipeline stage, on a GPU" in named
    assert "bfloat16" in named
    needed = report("model.transformer_impl=transformer_engine", "model.fp8=hybrid", "precision.dtype=bf16")
    assert "by pipeline stage, on a GPU" in needed
    assert "fp8 hybrid, recipe delayed" in needed
    assert "gathers up to" not in needed


def test_fp8_parameters_are_told(report: Callable[..., str]) -> None:
    keys = {"model.fp8_recipe": "tensorwise", "model.fp8": "hybrid", "model.transformer_impl": "transformer_engine"}
    keys |= {"model.fp8_param_gather": "true", "optimizer.use_distributed_optimizer": "true", "precision.dtype": "bf16"}
    told = report(*(f"{key}={value}" for key, value in keys.items()), "--world-size", "2")
    assert "parameters of the FP8 layers in FP8; a rank gathers up to" in told
    assert "weights: of the FP8 layers a matrix and its transpose in FP8, and none in bf16" in told
    assert "until there is an optimizer" in told


def test_the_table_adds_up_and_is_the_measured_arithmetic(config: Path, report: Callable[..., str]) -> None:
    """The cells are those that tests/train/test_memory.py holds against what a CPU run allocates."""
    text, setting = report(), plan_of(config).setting
    state, held = stage_state(setting, 0), stage_peak(setting, 0)
    (row,) = re.findall(r"^0 +\d.*$", text, re.MULTILINE)
    amounts = (state.weights, state.gradients, state.optimizer, held.saved, held.logits, held.temporary)
    cells = re.split(" {2,}", row)
    assert cells[3:6] + cells[7:] == [*map(size, amounts), size(sum(amounts))]


def test_overrides_stand_anywhere(report: Callable[..., str]) -> None:
    assert "8 = TP 2 x PP 2 x DP 2" in report(
        "model.tensor_model_parallel_size=2", "--world-size", "8", "model.pipeline_model_parallel_size=2"
    )


def test_validation_is_counted_as_the_loop_does_it(config: Path, report: Callable[..., str]) -> None:
    plan = plan_of(config)
    steps = plan.mixture.steps
    times = {0, 1, 2, 4, steps} | set(range(5, steps + 1, 5))
    batches = -(-len(plan.eval_sets["medical"]) // 8)
    cost = evaluation_cost(plan)
    assert (cost.times, cost.samples) == (len(times), 8 * batches)
    assert cost.share == pytest.approx(len(times) * batches / (len(times) * batches + 3 * steps))
    held_out = plan.eval_sets["medical"].stream.dataset
    assert f"medical: {len(plan.eval_sets['medical'])} samples, {held_out.tokens - 1:,} target tokens" in report()
    limited = report("eval.iters=1")
    assert f"medical: 8 of {len(plan.eval_sets['medical'])} samples, 256 target tokens" in limited
    assert "none (eval.sets is empty)" in report("eval.sets={}")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["schedule.lr_decay_style=constant", "schedule.lr_warmup_fraction=null"],
            ["without warm-up", "then constant"],
        ),
        (
            ["schedule.lr_decay_style=linear", "schedule.lr_decay_iters=10"],
            ["linear to the floor 3e-05 at iteration 10", "3e-05 to the end"],
        ),
        (
            ["schedule.lr_decay_style=WSD", "schedule.lr_wsd_decay_iters=4"],
            ["then constant, then exponential to 3e-05 over the last 4"],
        ),
        (
            ["schedule.lr_decay_style=infinite", "schedule.lr_constant=1e-4", "schedule.lr_cooldown_iters=5"],
            ["cosine to 0.0001 over 5 iterations, then constant", "no anneal"],
        ),
        (["train.train_iters=3"], ["the last (3) with"]),
    ],
)
def test_the_schedule_in_words(report: Callable[..., str], overrides: list[str], words: list[str]) -> None:
    text = report(*overrides)
    assert all(word in text for word in words), text


def test_frozen_layers_and_the_number_of_checkpoints_are_told(config: Path, report: Callable[..., str]) -> None:
    text, plan = report("train.freeze.bottom=1", "train.freeze.top=2"), plan_of(config)
    layer = plan.architecture.layer_matmul_parameters + 2 * plan.architecture.hidden_size
    assert f"{plan.architecture.parameters - 3 * layer:,} parameters are trained" in text
    steps = plan.mixture.steps
    assert f"every 7 iterations and at the end: {-(-steps // 7)} written, 2 kept" in text


def test_the_size_of_a_real_checkpoint_and_where_a_run_goes_on(config: Path, report: Callable[..., str]) -> None:
    """One iteration in bf16, then what the dry run says of it."""
    overrides = ["precision.dtype=bf16", "eval.sets={}", "logging.tensorboard=false"]
    done = command(config, "train.train_iters=1", *overrides)
    assert done.returncode == 0, done.stderr
    folder = config.parent / "run" / "checkpoints" / "iter_0000001"
    written = sum(path.stat().st_size for path in folder.glob("*.distcp"))
    plan = plan_of(config, "train.train_iters=1", *overrides)
    expected = checkpoint_bytes(plan.setting)
    assert expected <= written <= 1.02 * expected
    assert f"nothing to do: {folder} is the end of this plan" in report("train.train_iters=1", *overrides)
    text = report("train.train_iters=4", *overrides)
    assert f"resumes from {folder}; 3 iterations to come" in text
    assert "iteration 2 trains with" in text


def test_numbers_for_people() -> None:
    assert [size(n) for n in (0, 999, 1024, 1536 << 20, 1020 << 20, 5 << 50)] == [
        "0 B",
        "999 B",
        "1.00 KiB",
        "1.50 GiB",
        "1.00 GiB",
        "5,120.00 TiB",
    ]
    assert [flops(n) for n in (5, 1234, 2.5e15)] == ["5.0 FLOP", "1.2 kFLOP", "2.5 PFLOP"]
