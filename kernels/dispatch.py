"""Which of an operation's two forms runs, Triton or the torch reference beside it, and how many programs fill a device.

The rule is the tensors' device and nothing else: CUDA runs Triton; CPU runs the reference, or Triton's interpreter when
TRITON_INTERPRET=1 was set before these modules were imported. Nothing falls back: what Triton cannot do raises.
"""

import functools

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels were built for the interpreter: Triton decides when a function is decorated, so once a process."""


def runs_triton(*tensors: torch.Tensor) -> bool:
    """Whether an operation on these tensors runs its Triton kernels rather than its reference.

    Raises:
        ValueError: the tensors are on several kinds of device, or on one that is neither cuda nor cpu; or one is
            float64, whose digits arithmetic in fp32 would lose unseen.
    """
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        raise ValueError("kernels and their references compute in fp32: give them fp32, bf16 or fp16, not float64")
    kinds = {tensor.device.type for tensor in tensors}
    if kinds == {"cuda"}:
        return True
    if kinds == {"cpu"}:
        return INTERPRETED
    raise ValueError(f"kernels take tensors of one device, cuda or cpu, not of {', '.join(sorted(kinds))}")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 4 for the interpreter, so that programs share work there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., width] as [rows, width] with adjacent columns; a copy only where the strides leave no other way."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
