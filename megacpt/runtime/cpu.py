"""The CUDA-to-CPU redirection: the one place that lets megatron-core, which names CUDA throughout, run on a CPU.

`redirect_cuda()` replaces tensor factories (so that `device="cuda"` means the CPU), `Tensor.cuda`, `Tensor.type` (which
then answers in CUDA's words, as megatron-core's optimizers ask for) and the `torch.cuda` functions that megatron-core
calls on its way through a step. Wrapping the factories, rather than entering a `TorchFunctionMode`, leaves every other
operation at full speed. Entered once per process, only where there is no GPU; a GPU run never imports this file.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
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


def redirect_cuda() -> None:
    """Make CUDA mean the CPU in this process. Idempotent.

    Raises:
        AssertionError: a GPU is there; redirecting it would hide it.
    """
    assert not torch.cuda.is_available(), "the CPU redirection must not be entered where there is a GPU"
    if getattr(torch.cuda.current_device, "redirected", False):
        return
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

    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
