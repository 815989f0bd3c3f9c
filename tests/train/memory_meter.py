"""Bytes of all tensors that live in a process, and the most there were: what a step on a CPU allocates."""

import time
import weakref
from collections.abc import Callable, Iterator
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES = (
    "all_gather_single",
    "allgather",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "broadcast",
    "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced",
    "_allgather_base",
    "_reduce_scatter_base",
)
PATIENCE_S = 5.0


class Meter(TorchDispatchMode):
    """Counts the storage of every tensor that an operation returns, once, until nothing holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.counted: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tensors(output):
            self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.counted:
            return
        self.counted.add(key)
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.counted.discard(key)
        self.live -= size

    def begin(self) -> None:
        """Forget the peak so far."""
        self.most = self.live


def allocated(run: Callable[[], object], before: Callable[[], object] = lambda: None) -> int:
    """The most bytes that torch's CPU allocator had given out at once in `run`, over what it had before.

    Unlike `Meter` this has what operations make for themselves. What another thread frees, as gloo's may, is missed.

    Args:
        before: what leaves memory that `run` frees: only a free of what was given out under the profiler is seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        before()
        with record_function("run"):
            run()
    events = profiler.profiler.kineto_results.events()
    [start] = [event.start_ns() for event in events if event.name() == "run"]
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    during = sorted((change for change in changes if change[0] >= start), key=itemgetter(0))
    return max(accumulate(nbytes for _, nbytes in during), default=0)


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from tensors(item)


def settle_collectives() -> None:
    """Let every collective of this process return only when gloo's threads have let go of its tensors.

    They hold them until they are scheduled again, which on a busy machine is some operations later.
    """
    for name in COLLECTIVES:
        if hasattr(dist.ProcessGroup, name):
            setattr(dist.ProcessGroup, name, _settled(getattr(dist.ProcessGroup, name)))


class _Done:
    """A collective that is over."""

    def wait(self) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _settled(original: Callable[..., Any]) -> Callable[..., _Done]:
    def collective(self: Any, *args: Any, **kwargs: Any) -> _Done:
        own = [*tensors(args), *tensors(list(kwargs.values()))]
        before = [_holders(tensor) for tensor in own]
        original(self, *_aliases(args), **{name: _aliases(value) for name, value in kwargs.items()}).wait()
        deadline = time.monotonic() + PATIENCE_S
        while any(_holders(tensor) > count for tensor, count in zip(own, before, strict=True)):
            assert time.monotonic() < deadline, f"{original.__name__}: gloo does not let go of its tensors"
            time.sleep(1e-4)
        return _Done()

    return collective


def _holders(tensor: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _aliases(tree: Any) -> Any:
    """Other tensors on the same storages, so that what gloo still holds can be told from what we hold."""
    if isinstance(tree, torch.Tensor):
        return tree.detach()
    return type(tree)(map(_aliases, tree)) if isinstance(tree, list | tuple) else tree
