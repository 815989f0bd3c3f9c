"""Environment variables of a GPU run: each is set and explained here, before CUDA or NCCL reads it.

What the user has exported stays. CUDA reads its own when the driver is initialised, which already asking for the number
of GPUs does; torch's allocator with the first allocation; NCCL when the first communicator is made.
"""

import importlib
import os
from collections.abc import MutableMapping
from functools import cache

BLACKWELL = 10
"""Major compute capability from which the order of launches needs no help."""


def gpu_environment(
    tensor_parallel: int, context_parallel: int, *, cuda_graphs: bool = False, major: int = 0
) -> dict[str, str]:
    """What a rank's environment should hold.

    - CUDA_DEVICE_MAX_CONNECTIONS=1, with tensor or context parallelism: a collective is launched just before the matmul
      that it overlaps with. Through one hardware queue the card starts them in that order; through several the matmul
      may take all multiprocessors first, and the collective waits. Not set from Blackwell on, nor without TP and CP,
      where it would only put the gradient reduction in line behind compute.
    - NCCL_NVLS_ENABLE=0: NVLink SHARP keeps buffers for every communicator, memory that a full card lacks.
    - TORCH_NCCL_AVOID_RECORD_STREAMS=1: tensors of collectives in flight are kept by reference, not by the allocator's
      bookkeeping of streams, which frees them late.
    - PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: segments grow in place, so that buffers of changing size (packed
      documents, validation) leave no holes.
    - NCCL_GRAPH_REGISTER=0, with CUDA graphs: registered graph buffers and expandable segments do not go together.

    Args:
        major: of the card's compute capability; 0 if it is not known.
    """
    wanted = {
        "NCCL_NVLS_ENABLE": "0",
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    if (tensor_parallel > 1 or context_parallel > 1) and major < BLACKWELL:
        wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if cuda_graphs:
        wanted["NCCL_GRAPH_REGISTER"] = "0"
    return wanted


def set_gpu_environment(
    tensor_parallel: int,
    context_parallel: int,
    *,
    cuda_graphs: bool = False,
    environment: MutableMapping[str, str] = os.environ,
) -> None:
    """Set what is not set yet. Call it before anything asks torch about GPUs."""
    wanted = gpu_environment(
        tensor_parallel, context_parallel, cuda_graphs=cuda_graphs, major=compute_capability_major()
    )
    for name, value in wanted.items():
        environment.setdefault(name, value)


@cache
def compute_capability_major() -> int:
    """Of the first card, through NVML, which leaves CUDA alone; 0 where that does not answer."""
    try:
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        major, _ = pynvml.nvmlDeviceGetCudaComputeCapability(pynvml.nvmlDeviceGetHandleByIndex(0))
        pynvml.nvmlShutdown()
        return int(major)
    except Exception:  # Neither the package nor the driver's library has to be there.
        return 0
