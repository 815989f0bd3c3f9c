"""The environment of a GPU run."""

import subprocess
import sys

from megacpt.runtime.gpu import gpu_environment, set_gpu_environment


def test_one_connection_is_for_tensor_and_context_parallelism_before_blackwell() -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    assert gpu_environment(2, 1, major=9)[name] == gpu_environment(1, 2, major=9)[name] == "1"
    assert name not in gpu_environment(1, 1, major=9)
    assert name not in gpu_environment(8, 1, major=10)


def test_what_the_user_has_exported_stays() -> None:
    environment = {"NCCL_NVLS_ENABLE": "1"}
    set_gpu_environment(1, 1, cuda_graphs=True, environment=environment)
    assert environment["NCCL_NVLS_ENABLE"] == "1"
    assert environment["NCCL_GRAPH_REGISTER"] == "0"


def test_it_is_set_before_anything_asks_for_gpus() -> None:
    """A run that fails right after planning has set it by the time torch is first asked."""
    script = """
import os, sys, torch
seen = []
ask = lambda: bool(seen.append(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")))
torch.cuda.is_available = torch.cuda.device_count = ask
import megacpt.train.__main__ as entry
from megacpt.config.load import config_from
config = {"model": {"preset": "tiny", "tensor_model_parallel_size": 2}, "data": {"seq_length": 8},
          "train": {"global_batch_size": 1}, "optimizer": {"lr": 1.0}, "save": {"dir": "x"}}
entry.load_config = lambda path, overrides: config_from(config, "test")
entry.main(["--config", "x"])
print(seen[0])
"""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["1"], done.stderr
