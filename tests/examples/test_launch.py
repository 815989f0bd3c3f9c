"""The launch scripts, run as their comments say; Slurm's commands are stand-ins that run here what they are given."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.train.tiny import losses, tree, write_corpora

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"
SRUN = """#!/usr/bin/env bash
# Starts one task for each node, as srun does.
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || exit; done
"""
SCONTROL = "#!/usr/bin/env bash\n[[ $1 == show && $2 == hostnames ]] && printf '%s\\n' localhost localhost\n"


@pytest.fixture
def environment(tmp_path):
    """Python's own programs first on PATH, and this checkout to import."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "RANKS": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def config(tmp_path):
    write_corpora(tmp_path)
    path = tmp_path / "run.yaml"
    changes = {"train": {"train_iters": 4}, "eval": {"at": [], "every": None}}
    path.write_text(yaml.safe_dump(tree(tmp_path, "run", changes)))
    return path


def test_an_unknown_part_is_named_before_any_is_begun():
    done = subprocess.run([EXAMPLES / "measure_gpu.sh", "train", "nosuch"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no part nosuch; see the head of ")


def free_port():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return str(taken.getsockname()[1])


def train_alone(config, environment):
    """Losses and norms of the same steps on one rank."""
    alone = config.parent / "alone"
    command = [EXAMPLES / "launch.sh", "--config", config, f"save.dir={alone}"]
    subprocess.run(command, env=environment, check=True, cwd=config.parent)
    return losses(alone)


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.s*h*")))
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", EXAMPLES / script], check=True)
    assert os.access(EXAMPLES / script, os.X_OK)


def test_several_machines_need_a_head(config, environment):
    command = [EXAMPLES / "launch.sh", "--config", config]
    done = subprocess.run(command, env=environment | {"NODES": "2"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: NODES=2 needs HEAD")


@pytest.fixture
def slurm(tmp_path, environment):
    """The environment of a job of two nodes, and the two commands that the scripts use."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_ID": free_port(), "SLURM_NNODES": "2"}
    job |= {"SLURM_JOB_NODELIST": "localhost,localhost", "PATH": f"{tmp_path / 'bin'}{os.pathsep}{environment['PATH']}"}
    return environment | job


def test_slurm_trains_on_two_nodes_as_one(config, slurm, environment):
    """By `launch.sh` on each of them, as where there is no Slurm."""
    subprocess.run([EXAMPLES / "slurm_train.sbatch", "--config", config], env=slurm, check=True, timeout=240)
    found, expected = losses(config.parent / "run"), train_alone(config, environment)
    assert len(found[0]) == 4
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_slurm_ends_with_the_error_of_a_rank(config, slurm):
    command = [EXAMPLES / "slurm_train.sbatch", "--config", config, "optimizer.lrr=1"]
    done = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "optimizer.lrr" in done.stderr


def test_an_array_of_jobs_makes_the_dataset_of_one(tmp_path, slurm):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "document {number} of the corpus"}}\n' for number in range(200)))
    tokenizer = tmp_path / "tokenizer.model"
    train = [sys.executable, REPOSITORY / "tools/train_tokenizer.py", "--input", text, "--vocab-size", "300"]
    subprocess.run([*train, "--output", tokenizer], env=slurm, check=True)
    words = ["--input", text, "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer]
    for task in ("0", "1", "2"):
        array = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "1", "SHARDS": "3"}
        command = [EXAMPLES / "slurm_preprocess.sbatch", *words, "--output-prefix", tmp_path / "part"]
        subprocess.run(command, env=slurm | array, check=True)
    preprocess = [sys.executable, REPOSITORY / "tools/preprocess.py", *words, "--output-prefix", tmp_path / "whole"]
    subprocess.run(preprocess, env=slurm, check=True)
    shards = sorted(tmp_path.glob("part_text_document.shard-*.bin"))
    merge = [sys.executable, REPOSITORY / "tools/merge_datasets.py", "--input", *shards]
    subprocess.run([*merge, "--output-prefix", tmp_path / "merged"], env=slurm, check=True)
    for end in (".bin", ".idx"):
        assert (tmp_path / f"merged{end}").read_bytes() == (tmp_path / f"whole_text_document{end}").read_bytes()
