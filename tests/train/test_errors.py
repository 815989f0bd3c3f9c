"""A user's mistake: one sentence that says what is wrong and where, exit code 2, nothing written."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from megatron.core import dist_checkpointing

from megacpt.config.load import config_from
from megacpt.data.mixture.order import shuffled_pass
from megacpt.data.tokens.indexed import write_dataset
from megacpt.errors import UserError
from megacpt.files import lock
from megacpt.runtime import setup
from megacpt.train import planning
from megacpt.train.__main__ import main
from megacpt.train.build import build_job
from megacpt.train.planning import make_plan
from tests.commands import forked
from tests.ranks import run_ranks
from tests.train import tiny

Complaint = Callable[..., str]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    tiny.write_corpora(folder)
    run_ranks(tiny.train_here, 1, tiny.tree(folder, "base", {"train": {"train_iters": 2}}), 1)
    return folder


@pytest.fixture
def complaint(corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Complaint:
    """Run the command line on a changed configuration; checks the form of the error and returns its sentence."""

    def run(change: tiny.Tree, *arguments: str) -> str:
        configuration = tmp_path / "config.yaml"
        text = yaml.safe_dump(
            tiny.tree(corpora, "x", {"save": {"dir": str(tmp_path / "run")}}, change), sort_keys=False
        )
        configuration.write_text(text)
        assert main(["--config", str(configuration), *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert not (tmp_path / "run").exists()
        return captured.err

    return run


def _source(path: object) -> tiny.Tree:
    return {"data": {"sources": {"medical": {"path": str(path)}}}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"tensor_parallel_size": 2}}, ["tensor_parallel_size", "model.tensor_model_parallel_size"]),
        ({"optimiser": {"lr": 1}}, ["unknown key 'optimiser'", "'optimizer'"]),
        ({"train": {"seed": "x"}}, ["train.seed", "'x'"]),
        ({"data": {"sources": {"medical": {"epochs": 0}}}}, ["data.sources.medical.epochs"]),
        ({"data": {"sources": {"medical": {"weight": 0.5}}}}, ["data.sources.medical", "both epochs and weight"]),
        ({"data": {"sources": {"general": {"weight": 1.0}}}}, ["weights sum to 1"]),
        ({"model": {"preset": "tinny"}}, ["no preset 'tinny'", "'tiny'"]),
        ({"model": {"context_parallel_size": 2}}, ["cannot be divided into"]),
        ({"train": {"global_batch_size": 7}}, ["global_batch_size 7", "not divisible"]),
        ({"train": {"train_iters": 100_000}}, ["100,000 iterations", "holds"]),
        ({"data": {"seq_length": 4096}}, ["seq_length 4096", "max_position_embeddings"]),
        ({"data": {"reset_attention_mask": True}}, ["reset_position_ids"]),
        ({"train": {"freeze": {"top": 3, "bottom": 2}}}, ["5 layers are frozen", "has 4"]),
        ({"model": {"recompute_granularity": "full"}}, ["recompute_method"]),
        ({"model": {"sequence_parallel": True}}, ["sequence_parallel needs"]),
        ({"optimizer": {"overlap_param_gather": True}}, ["use_distributed_optimizer"]),
        ({"schedule": {"lr_decay_style": "WSD"}}, ["lr_wsd_decay_iters"]),
        ({"init": {"hf": "somewhere"}}, ["somewhere: no such folder"]),
        ({"init": {"checkpoint": "nowhere"}}, ["nowhere", "no checkpoint there"]),
        ({"model": {"vocab_size": 500}}, ["document", "token", "vocabulary has 500"]),
        ({"eval": {"sets": {"other": "absent_prefix"}}}, ["absent_prefix.idx", "no such file"]),
        ({"logging": {"wandb_project": "x"}}, ["logging.wandb_project", "wandb is not installed"]),
    ],
)
def test_configuration(complaint: Complaint, change: tiny.Tree, words: list[str]) -> None:
    sentence = complaint(change)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.tensor_model_parallel_size=3"], ["tensor_model_parallel_size 3", "num_attention_heads 4"]),
        (["model.pipeline_model_parallel_size=3"], ["pipeline_model_parallel_size 3", "num_layers 4"]),
        (["model.context_parallel_size=3"], ["context_parallel_size 3", "6 chunks", "seq_length 32"]),
    ],
)
def test_layouts(complaint: Complaint, overrides: list[str], words: list[str]) -> None:
    sentence = complaint({}, "--dry-run", "--world-size", "3", *overrides)
    assert all(word in sentence for word in words), sentence


def _train_unscanned(tree: tiny.Tree, folder: Path) -> int:
    """The command line on this rank, with stderr in a file, on datasets too large to be scanned beforehand."""
    planning.SCAN_LIMIT = 0
    configuration = folder / "config.yaml"
    configuration.write_text(yaml.safe_dump(tree))
    with open(folder / f"rank{os.environ['RANK']}", "w") as stderr, contextlib.redirect_stderr(stderr):
        return main(["--config", str(configuration)])


def test_one_rank_alone_meets_an_error(corpora: Path, tmp_path: Path) -> None:
    """Of a step's two samples the second is read by rank 1 only: it must speak, and only it."""
    lengths = np.array([33, 32])
    write_dataset(tmp_path / "foreign", np.dtype(np.uint16), [np.zeros(33), np.full(32, tiny.VOCABULARY)])
    seed = next(seed for seed in range(99) if shuffled_pass(lengths, seed, "medical", 0).documents.tolist() == [0, 1])
    train = {"train": {"micro_batch_size": 1, "global_batch_size": 2, "seed": seed}, "eval": {"at": []}}
    tree = tiny.tree(corpora, "x", train, {"save": {"dir": str(tmp_path / "run")}})
    tree["data"]["sources"] = {"medical": {"path": str(tmp_path / "foreign"), "epochs": 1}}
    assert run_ranks(_train_unscanned, 2, tree, tmp_path) == [2, 2]
    said = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert said[0] == ""
    assert said[1].startswith("error: ")
    assert "foreign.bin: document 1 holds token 1000" in said[1]


def test_datasets(complaint: Complaint, corpora: Path, tmp_path: Path) -> None:
    assert "missing.idx: no such file" in complaint(_source(tmp_path / "missing"))
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpora / 'medical'}{suffix}", f"{tmp_path / 'cut'}{suffix}")
    content = (tmp_path / "cut.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(content[: len(content) // 2])
    assert "cut.bin: truncated" in complaint(_source(tmp_path / "cut"))
    (tmp_path / "foreign.idx").write_bytes(b"PK\x03\x04" + bytes(60))
    (tmp_path / "foreign.bin").write_bytes(bytes(8))
    assert "foreign.idx: not a Megatron index" in complaint(_source(tmp_path / "foreign"))
    write_dataset(tmp_path / "empty", np.dtype(np.uint16), [])
    assert "0 documents" in complaint(_source(tmp_path / "empty"))


def test_starting_weights_of_another_model(complaint: Complaint, corpora: Path) -> None:
    start = {"init": {"checkpoint": str(corpora / "base")}}
    assert "its model.hidden_size is 48, this run's is 64" in complaint({**start, "model": {"hidden_size": 64}})


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"num_layers": 2}, "its num_layers is 4, this run's model.num_layers is 2"),
        ({"vocab_size": 1400}, "1,024 rows of vocabulary, this run needs 1,400"),
        ({"norm_epsilon": 1.0e-6}, "its norm_epsilon is 1e-05, this run's model.norm_epsilon is 1e-06"),
    ],
)
def test_starting_weights_of_a_foreign_checkpoint(
    complaint: Complaint, corpora: Path, tmp_path: Path, model: tiny.Tree, words: str
) -> None:
    """Without megacpt.json there are Megatron-LM's arguments."""
    (folder,) = (corpora / "base" / "checkpoints").glob("iter_*")
    foreign = shutil.copytree(folder, tmp_path / folder.name)
    (foreign / "megacpt.json").unlink()
    assert words in complaint({"init": {"checkpoint": str(foreign)}, "model": model})


def _save_weights(tree: tiny.Tree) -> None:
    """A checkpoint of fresh weights, and nothing else that says what they are."""
    config = config_from(tree, "test")
    plan = make_plan(config, 1, on_gpu=False)
    job = build_job(plan, setup.setup(plan.layout, config.train.seed, 1))
    folder = Path(config.save.dir) / "iter_0000000"
    folder.mkdir()
    dist_checkpointing.save({"model": job.chunks[0].sharded_state_dict()}, str(folder), async_strategy="mcore")


def _train_until_the_error(tree: tiny.Tree) -> str:
    with pytest.raises(UserError) as error:
        tiny.train_here(tree, 1)
    return str(error.value)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"num_layers": 2}, "Global shape mismatch"),
        ({"untie_embeddings_and_output_weights": False}, "output_layer.weight, which this run's model has not"),
    ],
)
def test_starting_weights_without_a_word(corpora: Path, tmp_path: Path, model: tiny.Tree, words: str) -> None:
    """There is nothing but the tensors themselves to compare."""
    weights, run = tmp_path / "weights", tmp_path / "run"
    run_ranks(_save_weights, 1, tiny.tree(corpora, "x", {"save": {"dir": str(weights)}}))
    change = {"init": {"checkpoint": str(weights / "iter_0000000")}, "save": {"dir": str(run)}, "model": model}
    (sentence,) = run_ranks(_train_until_the_error, 1, tiny.tree(corpora, "x", change))
    assert words in sentence
    assert "\n" not in sentence
    assert not run.exists()


def test_damaged_tracker(corpora: Path, complaint: Complaint, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\xfe")
    assert "expected an iteration" in complaint({"init": {"checkpoint": str(tmp_path)}})


def test_damaged_checkpoint(corpora: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(corpora / "base", run)
    (folder,) = (run / "checkpoints").glob("iter_*")
    for tensors in folder.glob("*.distcp"):
        tensors.write_bytes(tensors.read_bytes()[:1000])
    configuration = tmp_path / "config.yaml"
    configuration.write_text(yaml.safe_dump(tiny.tree(corpora, "x", {"save": {"dir": str(run)}}), sort_keys=False))
    assert f"{folder}: cannot be loaded" in _said_by_a_process(configuration)


def _main_of_a_rank(configuration: Path, stderr: Path) -> int:
    """The command line in this process, with all that it and its libraries write to stderr in a file."""
    with open(stderr, "w") as said:
        os.dup2(said.fileno(), 2)
    return main(["--config", str(configuration)])


def _said_by_a_process(configuration: Path) -> str:
    """What the command line says in a process of its own, which ends with a user's mistake."""
    stderr = configuration.parent / "stderr"
    assert run_ranks(_main_of_a_rank, 1, configuration, stderr) == [2]
    said = stderr.read_text()
    assert "Traceback" not in said
    return said


def test_run_folder_in_use(corpora: Path, tmp_path: Path) -> None:
    run, configuration = tmp_path / "run", tmp_path / "config.yaml"
    configuration.write_text(yaml.safe_dump(tiny.tree(corpora, "x", {"save": {"dir": str(run)}}), sort_keys=False))
    with lock(run / ".lock", "this test"):
        assert f"{run} is in use by another process" in _said_by_a_process(configuration)
    assert [path.name for path in run.iterdir()] == [".lock"]


@pytest.mark.parametrize("damage", ['{"iteration": 2}', "[]", "{", '{"mixture": {}}'])
def test_damaged_state(complaint: Complaint, corpora: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(corpora / "base", tmp_path / "damaged")
    (folder,) = (tmp_path / "damaged" / "checkpoints").glob("iter_*")
    state = json.loads((folder / "megacpt.json").read_text())
    text = json.dumps(state | json.loads(damage)) if damage.startswith('{"mixture') else damage
    (folder / "megacpt.json").write_text(text)
    assert "megacpt.json: damaged" in complaint({"save": {"dir": str(tmp_path / "damaged")}})


def test_port_in_use(corpora: Path, tmp_path: Path) -> None:
    configuration = tmp_path / "config.yaml"
    tree = tiny.tree(corpora, "x", {"save": {"dir": str(tmp_path / "run")}})
    configuration.write_text(yaml.safe_dump(tree, sort_keys=False))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"}
        result = forked("-m", "megacpt.train", "--config", configuration, environment=meeting)
    assert result.returncode == 2
    assert f"127.0.0.1:{port}" in result.stderr
    assert "in use" in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_first_rank_gets_time_to_speak(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun ends all ranks as soon as one ends: another rank must not end before the first has spoken."""
    monkeypatch.setattr(setup, "GRACE_S", 0.5)
    for rank, least in (("0", 0.0), ("1", 0.5)):
        monkeypatch.setenv("RANK", rank)
        began = time.monotonic()
        assert main(["--config", str(tmp_path / "absent.yaml")]) == 2
        assert time.monotonic() - began >= least
        assert "absent.yaml: cannot be read" in capsys.readouterr().err


def test_the_run_folder_is_a_file(corpora: Path, tmp_path: Path) -> None:
    configuration = tmp_path / "config.yaml"
    configuration.write_text(yaml.safe_dump(tiny.tree(corpora, "x", {"save": {"dir": str(configuration)}})))
    assert f"{configuration}: cannot be made" in _said_by_a_process(configuration)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_keeps_the_last_checkpoint(corpora: Path, tmp_path: Path, small_disk: Path) -> None:
    configuration = tmp_path / "config.yaml"
    changes = {"save": {"dir": str(small_disk / "run"), "interval": 1, "keep_last": None}}
    shape = {"model": {"hidden_size": 8, "ffn_hidden_size": 8, "kv_channels": 2}}
    configuration.write_text(yaml.safe_dump(tiny.tree(corpora, "x", changes, shape), sort_keys=False))
    result = forked("-m", "megacpt.train", "--config", configuration)
    assert result.returncode == 2, result.stderr
    assert "the disk is full" in result.stderr
    assert "Traceback" not in result.stderr
    checkpoints = small_disk / "run" / "checkpoints"
    assert not list(checkpoints.glob(".*"))
    latest = (checkpoints / "latest_checkpointed_iteration.txt").read_text().strip()
    assert (checkpoints / f"iter_{int(latest):07d}" / "megacpt.json").is_file()
