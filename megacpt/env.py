"""What a machine has for megacpt, and what each missing piece would give: `python -m megacpt.env [--json]`.

Prints the same on a laptop and in a container. Attach it to a report of a problem, and run it on every kind of node
before a large run: it asks the drivers and packages, starts no process group and changes nothing.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from megacpt.runtime.environment import version_of, versions

OPTIONAL = {
    "transformer-engine": "fused layers, FP8 and context parallelism",
    "flash-attn": "flash attention of its own; Transformer Engine has cuDNN's without it",
    "apex": "fused optimizer and gradient accumulation where Transformer Engine is absent",
    "gigatoken": "encoding 20 to 70 times as fast as the reference tokenizers",
    "ufal.kenlm": "scoring with KenLM models (or the package kenlm)",
    "ray": "--engine ray",
    "lm-eval": "tasks of lm-evaluation-harness",
    "transformers": "the gate of imported weights, and GGUF",
    "liger-kernel": "a peer of tools/bench.py kernels",
}
"""Packages that are used where they are, and for what."""
PREFIXES = ("NCCL_", "TORCH_", "CUDA_", "NVTE_", "TRITON_", "SLURM_JOB", "OMP_NUM", "MEGACPT_")
"""Environment variables that change what a run does begin with these."""
QUERY = ("name", "memory.total", "driver_version", "clocks.max.sm", "power.limit", "persistence_mode")


def gpus() -> list[dict[str, Any]]:
    """Each GPU as torch sees it."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def said_by(*command: str) -> list[str]:
    """Lines that a program prints; none where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def report() -> dict[str, Any]:
    """All of it, as JSON has it."""
    import torch

    on_gpu = torch.cuda.is_available()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "versions": versions(),
        "optional": {name: version_of(name) for name in OPTIONAL},
        "platform": platform.platform(),
        "cpu": {"cores": len(os.sched_getaffinity(0)), "memory_bytes": memory},
        "torch": {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if on_gpu else None,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
            "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
        },
        "gpus": gpus() if on_gpu else [],
        "nvidia_smi": said_by("nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"),
        "topology": said_by("nvidia-smi", "topo", "-m"),
        "network": said_by("ibdev2netdev"),
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(PREFIXES)},
    }


def told(found: dict[str, Any]) -> list[str]:
    """A report in lines."""
    torch, gpus = found["torch"], found["gpus"]
    lines = [" | ".join(f"{name} {version}" for name, version in found["versions"].items())]
    lines.append(f"{found['platform']}, {found['cpu']['cores']} cores, {found['cpu']['memory_bytes'] / 2**30:.0f} GiB")
    if gpus:
        lines.append(f"CUDA {torch['cuda']}, cuDNN {torch['cudnn']}, NCCL {torch['nccl']}")
        lines += [
            f"GPU {index}: {gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, compute capability "
            f"{gpu['compute_capability']}, {gpu['multiprocessors']} multiprocessors"
            for index, gpu in enumerate(gpus)
        ]
        lines += [*found["nvidia_smi"], *found["topology"], *found["network"]]
    else:
        lines.append("no GPU: training runs on the CPU with gloo, the kernels as their torch references")
    for name, use in OPTIONAL.items():
        version = found["optional"][name]
        lines.append(f"{name:<20} {'absent: ' + use if version == 'absent' else version}")
    settings = found["environment"].items()
    return [*lines, *(f"{key}={value}" for key, value in settings)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 0."""
    parser = argparse.ArgumentParser(prog="python -m megacpt.env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="for programs")
    found = report()
    print(json.dumps(found, indent=2) if parser.parse_args(arguments).json else "\n".join(told(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
