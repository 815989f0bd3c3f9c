"""A run that stopped goes on as if it had not: bit for bit on the same layout, within rounding on another."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from megacpt.config.load import config_from
from megacpt.errors import UserError
from megacpt.train.planning import make_plan
from tests.commands import forked_ranks
from tests.ranks import run_ranks
from tests.train import tiny

CONTEXT: tiny.Tree = {"model": {"context_parallel_size": 2}}
STOP = {"train": {"train_iters": 8}}
"""Past the end of the first medical pass is step 16; 8 lies inside it and 24 in the second."""
UNEVALUATED: tiny.Tree = {"eval": {"at": [], "every": None}}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    tiny.write_corpora(folder)
    return folder


@pytest.fixture(scope="module")
def whole(corpora: Path) -> Path:
    """A run to its end without a stop."""
    run_ranks(tiny.train_here, 1, tiny.tree(corpora, "whole"), 1)
    return corpora / "whole"


@pytest.fixture(scope="module")
def stopped(corpora: Path) -> Path:
    """The same run after 8 steps, to be copied."""
    run_ranks(tiny.train_here, 1, tiny.tree(corpora, "stopped", STOP), 1)
    return corpora / "stopped"


def test_resume_is_bit_identical_across_a_pass(corpora: Path, whole: Path, stopped: Path) -> None:
    shutil.copytree(stopped, corpora / "parts")
    run_ranks(tiny.train_here, 1, tiny.tree(corpora, "parts", {"train": {"train_iters": 24}}), 1)
    (facts,) = run_ranks(tiny.train_here, 1, tiny.tree(corpora, "parts"), 1)
    expected = tiny.rows(whole)
    assert tiny.rows(corpora / "parts") == expected
    assert expected[-1]["iteration"] > 24
    medical = [row["epochs_by_source"]["medical"] for row in expected if "lm_loss" in row]
    assert min(medical) < 1 < max(medical)
    assert facts["own_steps"]
    assert set(facts["steps"]) == {float(facts["iteration"])}


def test_resume_in_the_middle_of_the_third_pass_of_a_mixture_is_bit_identical(corpora: Path) -> None:
    """The domain is drawn anew each pass, the general part is the first pass's, and a phase begins with pass 4."""
    passes = tiny.passes(corpora)
    passes["data"]["mixture"]["pass_tokens"] = 32 * 32
    passes["data"]["phases"] = [{"after_tokens": 3 * 32 * 32, "replay": 0.5}]
    passes |= {"eval": {"every": 5}, "train": {"micro_batch_size": 8}}
    run_ranks(tiny.train_here, 1, tiny.tree(corpora, "dynamic", passes), 1)
    run_ranks(tiny.train_here, 1, tiny.tree(corpora, "dynamic_parts", passes, {"train": {"train_iters": 10}}), 1)
    run_ranks(tiny.train_here, 1, tiny.tree(corpora, "dynamic_parts", passes), 1)
    whole = tiny.rows(corpora / "dynamic")
    assert tiny.rows(corpora / "dynamic_parts") == whole
    training = [row for row in whole if "lm_loss" in row]
    tokens = np.array([[row["tokens_by_source"][name] for name in ("medical", "general")] for row in training])
    assert tokens.reshape(4, 4, 2).sum(axis=1).tolist() == [[24 * 32, 8 * 32]] * 3 + [[16 * 32, 16 * 32]]


def test_resume_is_bit_identical_between_log_lines(corpora: Path) -> None:
    slow = {"train": {"log_interval": 3, "train_iters": 8}, "save": {"interval": 4}}
    run_ranks(tiny.train_here, 1, tiny.tree(corpora, "whole3", slow), 1)
    run_ranks(tiny.train_here, 1, tiny.tree(corpora, "parts3", slow, {"train": {"train_iters": 5}}), 1)
    # The early stop at 5 writes a row of its own; the checkpoint at 4 lies inside an interval.
    checkpoints = corpora / "parts3" / "checkpoints"
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("4\n")
    run_ranks(tiny.train_here, 1, tiny.tree(corpora, "parts3", slow), 1)
    assert tiny.rows(corpora / "parts3") == tiny.rows(corpora / "whole3")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_on_another_layout(corpora: Path, dtype: str) -> None:
    precision = {"precision": {"dtype": dtype}} | UNEVALUATED
    name = f"from_tp2_{dtype}"
    tp2, end = tiny.layout(tp=2, sp=True), {"train": {"train_iters": 12}}
    run_ranks(tiny.train_here, 2, tiny.tree(corpora, name, tp2, precision, STOP), 2)
    stopped = corpora / f"{name}_stopped"
    shutil.copytree(corpora / name, stopped)
    run_ranks(tiny.train_here, 2, tiny.tree(corpora, name, tp2, precision, end), 2)
    loss, norm = tiny.losses(corpora / name, after=8)
    others = {
        "pp2": tiny.layout(pp=2),
        "dp2": tiny.layout(),
        "dp2_distributed": tiny.layout(distributed=True),
        "pp2_vp2": tiny.layout(pp=2, vp=2),
        "cp2": CONTEXT,
    }
    for other, changes in others.items():
        run = f"{name}_{other}"
        shutil.copytree(stopped, corpora / run)
        facts = run_ranks(tiny.train_here, 2, tiny.tree(corpora, run, changes, precision, end), 2)
        loss_then, norm_then = tiny.losses(corpora / run, after=8)
        exact = dtype == "fp32"
        np.testing.assert_allclose(loss_then, loss, rtol=1e-6 if exact else 2e-3)
        np.testing.assert_allclose(norm_then, norm, rtol=1e-5 if exact else 5e-2)
        assert all(fact["own_steps"] and set(fact["steps"]) == {float(fact["iteration"])} for fact in facts)


def test_distributed_optimizer_state_goes_to_any_other(corpora: Path) -> None:
    for dtype in ("fp32", "bf16"):
        precision = {"precision": {"dtype": dtype}} | UNEVALUATED
        run = f"from_distributed_{dtype}"
        sharded, end = tiny.layout(distributed=True), {"train": {"train_iters": 8}}
        stop = {"train": {"train_iters": 4}}
        run_ranks(tiny.train_here, 2, tiny.tree(corpora, run, sharded, precision, stop), 2)
        run_ranks(tiny.train_here, 2, tiny.tree(corpora, run + "_whole", sharded, precision, end), 2)
        run_ranks(tiny.train_here, 1, tiny.tree(corpora, run, precision, end), 1)
        loss, _ = tiny.losses(corpora / run, after=4)
        expected, _ = tiny.losses(corpora / (run + "_whole"), after=4)
        assert len(loss) == 4
        np.testing.assert_allclose(loss, expected, rtol=1e-6 if dtype == "fp32" else 2e-3)


@pytest.mark.parametrize("distributed", [False, True])
def test_context_parallel_ranks_go_on_and_so_does_one_alone(corpora: Path, distributed: bool) -> None:
    run = f"context_{distributed}"
    context = CONTEXT | {"optimizer": {"use_distributed_optimizer": distributed}}
    end = {"train": {"train_iters": 8}, "eval": {"every": 4}}
    stop = {"train": {"train_iters": 4}, "eval": {"every": 4}}
    run_ranks(tiny.train_here, 2, tiny.tree(corpora, f"{run}_whole", context, end), 2)
    run_ranks(tiny.train_here, 2, tiny.tree(corpora, run, context, stop), 2)
    shutil.copytree(corpora / run, corpora / f"{run}_alone")
    run_ranks(tiny.train_here, 2, tiny.tree(corpora, run, context, end), 2)
    assert tiny.rows(corpora / run) == tiny.rows(corpora / f"{run}_whole")
    run_ranks(tiny.train_here, 1, tiny.tree(corpora, f"{run}_alone", end), 1)
    for found, expected in zip(tiny.losses(corpora / f"{run}_alone"), tiny.losses(corpora / run), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    alone, shared = (tiny.rows(corpora / name) for name in (f"{run}_alone", run))
    assert [row.get("consumed_tokens") for row in alone] == [row.get("consumed_tokens") for row in shared]


def test_a_checkpoint_has_what_overlap_param_gather_still_owes(corpora: Path) -> None:
    flags = ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
    # Without an evaluation, whose forward pass would pay.
    overlap = {"optimizer": dict.fromkeys(flags, True), "eval": {"at": [], "every": None}, "train": {"train_iters": 6}}
    whole, parts = (tiny.tree(corpora, f"overlap_{name}", overlap) for name in ("whole", "parts"))
    run_ranks(tiny.train_here, 2, whole, 2)
    parts["train"]["train_iters"] = 3
    run_ranks(tiny.train_here, 2, parts, 2)
    parts["train"]["train_iters"] = 6
    run_ranks(tiny.train_here, 2, parts, 2)
    assert tiny.rows(corpora / "overlap_parts") == tiny.rows(corpora / "overlap_whole")


def test_weights_only_start(corpora: Path, stopped: Path) -> None:
    start = {"init": {"checkpoint": str(stopped / "checkpoints")}, "train": {"train_iters": 2}}
    run_ranks(tiny.train_here, 2, tiny.tree(corpora, "child", start, tiny.layout(pp=2)), 2)
    base_end = [row for row in tiny.rows(stopped) if "validation" in row and row["iteration"] == 8]
    child_start = [row for row in tiny.rows(corpora / "child") if "validation" in row and row["iteration"] == 0]
    for before, after in zip(base_end, child_start, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-6)
    assert tiny.rows(corpora / "child")[-1]["iteration"] == 2


def test_changed_mixture_is_refused_and_then_accepted(corpora: Path, stopped: Path) -> None:
    shutil.copytree(stopped, corpora / "mix")
    change = {"data": {"sources": {"general": {"weight": 0.5}}}}
    with pytest.raises(UserError, match=r"source 'general': weight 0.25 -> weight 0.5.*accept_change"):
        make_plan(config_from(tiny.tree(corpora, "mix", change), "test"), 1, on_gpu=False)
    accepted = tiny.tree(corpora, "mix", change, {"data": {"accept_change": True}})
    plan = make_plan(config_from(accepted, "test"), 1, on_gpu=False)
    assert plan.mixture.start.sample == 64
    run_ranks(tiny.train_here, 1, accepted | UNEVALUATED, 1)
    training = [row for row in tiny.rows(corpora / "mix") if "lm_loss" in row]
    assert [row["iteration"] for row in training] == list(range(1, plan.last_iteration + 1))
    assert training[-1]["epochs_by_source"]["medical"] == pytest.approx(2, abs=0.1)


def test_tokens_of_a_removed_source_still_count(corpora: Path) -> None:
    everything = tiny.tree(corpora, "removed", {"train": {"train_iters": 4}})
    run_ranks(tiny.train_here, 1, everything, 1)
    without = tiny.tree(corpora, "removed", {"train": {"train_iters": 6}, "data": {"accept_change": True}})
    del without["data"]["sources"]["general"]
    run_ranks(tiny.train_here, 1, without, 1)
    run_ranks(tiny.train_here, 1, tiny.tree(corpora, "removed", {"data": {"accept_change": True}}), 1)
    training = [row for row in tiny.rows(corpora / "removed") if "lm_loss" in row]
    assert "general" not in training[5]["tokens_by_source"]
    counted = np.cumsum([sum(row["tokens_by_source"].values()) for row in training])
    assert [row["consumed_tokens"] for row in training] == counted.tolist()


def test_going_back_to_an_older_checkpoint(corpora: Path) -> None:
    every = {"save": {"interval": 2, "keep_last": None}}
    run_ranks(tiny.train_here, 1, tiny.tree(corpora, "back", STOP, every), 1)
    checkpoints = corpora / "back" / "checkpoints"
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("4\n")
    again = tiny.tree(corpora, "back", {"train": {"train_iters": 6}}, {"save": {"interval": 2, "keep_last": 1}})
    run_ranks(tiny.train_here, 1, again, 1)
    assert sorted(folder.name for folder in checkpoints.glob("iter_*")) == ["iter_0000006", "iter_0000008"]
    (facts,) = run_ranks(tiny.train_here, 1, tiny.tree(corpora, "back", STOP, every), 1)
    assert facts["iteration"] == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"hidden_size": 64}}, r"model\.hidden_size was 48 .* is now 64"),
        ({"train": {"freeze": {"top": 1}}}, r"train\.freeze\.top was 0 .* is now 1"),
        ({"precision": {"dtype": "bf16"}}, r"precision\.dtype was float32 .* is now bfloat16"),
        ({"train": {"global_batch_size": 16}}, r"train\.global_batch_size was 8"),
        ({"data": {"seq_length": 16}}, r"seq_length 32 -> 16"),
        ({"train": {"seed": 5}}, r"seed 1234 -> 5"),
    ],
)
def test_another_model_or_order_is_refused(corpora: Path, stopped: Path, change: tiny.Tree, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(config_from(tiny.tree(corpora, stopped.name, change), "test"), 1, on_gpu=False)


def _kill_forked(configuration: Path, moment: Callable[[], bool]) -> None:
    """Two ranks, each killed on its own."""
    ranks = forked_ranks(2, "-m", "megacpt.train", "--config", configuration)
    _wait_for(moment, lambda: all(rank.process.is_alive() for rank in ranks))
    for rank in ranks:
        rank.process.kill()
    assert [rank.wait().returncode for rank in ranks] == [-signal.SIGKILL] * 2


def _kill_torchrun(configuration: Path, moment: Callable[[], bool]) -> None:
    """As a user starts it; torchrun's ranks live in sessions of their own, and end with it."""
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*runner, "-m", "megacpt.train", "--config", configuration],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    _wait_for(moment, lambda: process.poll() is None)
    ranks = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert ranks
    assert not alive


def _wait_for(moment: Callable[[], bool], alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not moment():
        assert alive(), "it ended before that moment"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_kill_at_any_moment(corpora: Path) -> None:
    """SIGKILL to every process, three times: while starting, in a step, and as soon as a save begins."""
    changes = (
        tiny.layout(tp=2),
        {"save": {"interval": 2}, "logging": {"tensorboard": True}, "train": {"train_iters": 14}},
    )
    run_ranks(tiny.train_here, 2, tiny.tree(corpora, "unkilled", *changes), 2)
    configuration = corpora / "killed.yaml"
    configuration.write_text(yaml.safe_dump(tiny.tree(corpora, "killed", *changes), sort_keys=False))
    run = corpora / "killed"

    def trained(iterations: int) -> bool:
        metrics = run / "metrics.jsonl"
        return metrics.is_file() and metrics.read_text().count("lm_loss") >= iterations

    _kill_forked(configuration, run.is_dir)
    _kill_torchrun(configuration, lambda: trained(5))
    _kill_forked(configuration, lambda: trained(6) and any((run / "checkpoints").glob(".iter_*")))
    for rank in forked_ranks(2, "-m", "megacpt.train", "--config", configuration):
        done = rank.wait()
        assert done.returncode == 0, done.stderr[-2000:]
    assert tiny.rows(run) == tiny.rows(corpora / "unkilled")
    assert not list((run / "checkpoints").glob(".*"))
    _check_tensorboard(run)


def _check_tensorboard(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    training = [row for row in tiny.rows(run) if "lm_loss" in row]
    drawn = events.Scalars("lm loss")
    assert [event.step for event in drawn] == [row["iteration"] for row in training]
    np.testing.assert_allclose([event.value for event in drawn], [row["lm_loss"] for row in training], rtol=1e-6)
    assert {"learning-rate", "grad-norm", "lm loss vs samples", "lm loss validation-medical ppl"} <= set(
        events.Tags()["scalars"]
    )


def test_a_cut_off_row_is_dropped(corpora: Path, whole: Path, stopped: Path) -> None:
    shutil.copytree(stopped, corpora / "cut")
    metrics = corpora / "cut" / "metrics.jsonl"
    with open(metrics, "a", encoding="utf-8") as handle:
        handle.write(json.dumps({"iteration": 9, "lm_loss": 1.0}) + '\n{"iteration": 10, "lm_l')
    run_ranks(tiny.train_here, 1, tiny.tree(corpora, "cut", {"train": {"train_iters": 16}}), 1)
    assert tiny.rows(corpora / "cut") == [row for row in tiny.rows(whole) if row["iteration"] <= 16]
