"""The CUDA-to-CPU redirection: the one place that lets megatron-core, which names CUDA throughout, run on a CPU.

`redirect_cuda()` replaces tensor factories (so that `device="cuda"` means the CPU), `Tensor.cuda`, `Tensor.type` (which
then answers in CUDA's words, as megatron-core's optimizers ask for) and the `torch.cuda` functions that megatron-core
calls on its way through a step. Wrapping the factories, rather than entering a `TorchFunctionMode`, leaves every other
operation at full speed. Entered once per process, only where there is no GPU; a GPU run never imports this file.

It also puts torch where megatron-core calls Transformer Engine (optimizers and norms, whose kernels need a GPU even
where the package is installed) or apex (a weight's gradient added to its buffer by the matmul, gradients scaled in
place), lets the allocator keep what a step frees for the next one, and has the distributed optimizer's collectives work
in its buffers, where gloo would copy all of them.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "randn_like",
    "tensor",
    "zeros",
    "zeros_like",
)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""From glibc's malloc.h, parameters of mallopt."""
KEPT_BYTES = 1 << 30
"""Allocations smaller than this come from memory that was freed before, if there is any."""

ADDED_AT_ONCE = 1 << 15
"""Elements of bf16 that are widened at a time before they are added to fp32."""


class _Stream:
    """A stream on a device that has only one: everything is already in order."""

    cuda_stream = 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: object = None) -> object:
        return event or _Event()

    def synchronize(self) -> None:
        pass


class _Event:
    """An event of such a stream: always past."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)  # for copies to a GPU, and without one there is nobody to pin it
        return function(*args, **kwargs)

    return factory


def _tensor_to(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(CPU if _is_cuda(arg) else arg for arg in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    return to


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        return original(self, dtype, *args, **kwargs)

    return type_


def keep_freed_memory() -> None:
    """Let glibc reuse a step's large tensors in the next step.

    By default they are mapped and unmapped each time, and the kernel has to zero every page of them again. Another C
    library is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def _add_weight_gradient(inputs: torch.Tensor, gradients: torch.Tensor, buffer: torch.Tensor) -> None:
    """buffer [out, in] += gradients [rows, out]^T inputs [rows, in]; in one pass where the three share a dtype."""
    if inputs.dtype is buffer.dtype:
        buffer.addmm_(gradients.t(), inputs)
        return
    product = gradients.t() @ inputs
    rows = max(1, ADDED_AT_ONCE // product.shape[1])
    # On a CPU torch first copies all of a narrower operand into the wider dtype.
    for part, addend in zip(buffer.split(rows), product.split(rows), strict=True):
        part.add_(addend)


def _scale(chunk: int, flag: torch.Tensor, lists: Sequence[Sequence[torch.Tensor]], scale: float) -> None:
    """amp_C.multi_tensor_scale: the second list is the first one times `scale`, which may be the same tensors."""
    for source, target in zip(*lists, strict=True):
        torch.mul(source, scale, out=target)


def _reduce_where_it_lies(
    shard: torch.Tensor, whole: torch.Tensor, op: Any, group: dist.ProcessGroup, async_op: bool
) -> None:
    """Sum a gradient buffer over ranks; `shard`, this rank's part, is a view of it.

    gloo's reduce-scatter is an all-reduce of a copy: this is the same sum, to the bit. As there, the other parts are
    of no further use.
    """
    if async_op:
        # One bucket at a time: torch's coalescing takes it, and does not copy it.
        dist.all_reduce(whole, op=op, group=group, async_op=True)
        return
    options = dist.AllreduceOptions()
    options.reduceOp = op
    group.allreduce([whole], options).wait()


def _gather_where_it_lies(whole: torch.Tensor, shard: torch.Tensor, group: dist.ProcessGroup, async_op: bool) -> None:
    """Fill a parameter buffer with the parts of all ranks; `shard`, this rank's, is a view of it.

    gloo gathers into a buffer of its own and copies from there. Ready on return, also where megatron-core would wait
    later.
    """
    works = []
    for rank, part in enumerate(whole.chunk(group.size())):
        options = dist.BroadcastOptions()
        options.rootRank = rank
        works.append(group.broadcast([part], options))
    for work in works:
        work.wait()


def _do_without_engine() -> None:
    """Let megatron-core be what it is where neither Transformer Engine nor apex is installed."""
    import megatron.core.optimizer as optimizers
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    optimizers.Adam, optimizers.SGD = torch.optim.AdamW, torch.optim.SGD
    optimizers.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.Adam = torch.optim.Adam
    distrib_optimizer.HAVE_APEX_OR_TE = False
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_impl, clip_grads.multi_tensor_scale_tensor_impl = _scale, None
    optimizer.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    transformer_block.LayerNormImpl = WrappedTorchNorm
    layers.HAVE_TE = False  # of what stands for a gradient that is added already, the package keeps a copy for good


def redirect_cuda() -> None:
    """Make CUDA mean the CPU in this process. Idempotent.

    Raises:
        AssertionError: a GPU is there; redirecting it would hide it.
    """
    assert not torch.cuda.is_available(), "the CPU redirection must not be entered where there is a GPU"
    if getattr(torch.cuda.current_device, "redirected", False):
        return
    keep_freed_memory()
    # `with torch.device("meta")` knows factories by identity: let it see the real ones before they are wrapped.
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.to = _tensor_to(torch.Tensor.to)  # type: ignore[method-assign]
    torch.Tensor.type = _tensor_type(torch.Tensor.type)  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda self, s: None  # type: ignore[method-assign]

    def current_device() -> torch.device:
        return CPU

    current_device.redirected = True  # type: ignore[attr-defined]
    stream = _Stream()
    replacements: dict[str, Any] = {
        "current_device": current_device,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
        "synchronize": lambda device=None: None,
        "set_device": lambda device: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": torch.default_generator.manual_seed,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)

    _do_without_engine()
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import layers, random

    param_and_grad_buffer.dist_reduce_scatter_func = _reduce_where_it_lies
    param_and_grad_buffer.dist_all_gather_func = _gather_where_it_lies
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=_add_weight_gradient, wgrad_gemm_accum_fp16=_add_weight_gradient
    )
    layers._grad_accum_fusion_available = True
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
