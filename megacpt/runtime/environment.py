"""What this process runs on, for the start-up report and for checkpoints."""

import importlib.metadata
import platform

import torch

import megacpt

PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex", "flash-attn", "triton", "numpy")


def version_of(package: str) -> str:
    """The installed version, or "absent"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def versions() -> dict[str, str]:
    """Versions of megacpt, Python and of every package that changes what a step computes."""
    return {"megacpt": megacpt.__version__, "python": platform.python_version()} | {p: version_of(p) for p in PACKAGES}


def describe_device(device: torch.device, threads: int) -> str:
    """One line: the GPU, or the CPU with its threads."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.get_device_name(device)} ({memory / 2**30:.0f} GiB)"
    return f"CPU, {threads} thread{'s' if threads > 1 else ''} per rank (CUDA calls of megatron-core redirected)"
