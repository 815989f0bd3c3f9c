"""megatron-core without torch's compiler where there is no GPU.

It hands functions to torch.compile as it defines them, which loads all of the compiler: seconds of every start. A run
on a CPU calls next to none of them.
"""

from collections.abc import Callable
from typing import Any

import torch


def load_megatron_core() -> None:
    """Import megatron-core as this machine runs it; a command calls it before anything else imports the package.

    Without a GPU its functions stay as they are written, those of modules that it imports later as well; torch.compile
    itself is as it was. With one this is a plain import.
    """
    compiled = torch.compile
    if not torch.cuda.device_count():  # asks NVML: CUDA has still to read the environment that `setup` makes
        torch.compile = _as_written  # type: ignore[assignment]
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = compiled


def _as_written(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    """torch.compile, bare or with options, as a decorator that does nothing."""
    return _as_written if function is None else function
