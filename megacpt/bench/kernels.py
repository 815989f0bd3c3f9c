"""Kernels beside those of others: time on the device, and the share of what it does at best.

Gate first: whoever's outputs or gradients are not the reference's has no speed. Then a CUDA graph of several calls, all
on inputs of their own so that none is in the cache, is replayed: it measures the device, not the launching. Calls that
wait for the device cannot be in a graph: they are timed as they are, and the row says so.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from megacpt.bench.ceilings import Ceilings, measure_ceilings, seconds_between_events
from megacpt.bench.kernel_cases import Form, Inputs, KernelCase
from megacpt.bench.rows import OURS, TIME_UP, Recorder
from megacpt.errors import UserError

CACHE_BYTES = 256 << 20
"""Inputs of the calls in a graph are at least as large together: several times an H100's L2."""
CALLS = 4
REPLAYS = 20


@dataclass(frozen=True)
class Timing:
    """Seconds on the device of one call; `synchronises`: with the time in which it waits for its host."""

    seconds: float
    synchronises: bool = False


Timer = Callable[[Sequence[Callable[[], object]]], Timing]
"""Times one of several calls."""


def measure(
    recorder: Recorder,
    cases: Sequence[KernelCase],
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer | None = None,
    deadline: float = math.inf,
) -> None:
    """Rows of these cases: forward, and forward with backward. After `deadline`, of time.monotonic, none is begun.

    Raises:
        UserError: at the end, if one of ours fails or computes something else. Rows tell of that, and of peers.
    """
    ceilings = measure_ceilings(device, dtype)
    failed = []
    for case, (tool, form) in ((one, form) for one in cases for form in one.forms.items()):
        title = f"{case.name}, {case.size}, {str(dtype).removeprefix('torch.')}"
        if time.monotonic() >= deadline:
            recorder.add("kernels", f"{title}, forward", tool, 0, "us", TIME_UP)
            continue
        try:
            found = _gate_and_times(case, form, device, dtype, timer or seconds_on_device)
        except Exception as error:  # Others raise whatever they like, and a graph whatever they did in it.
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            found = f"did not run: {problem[:120]}"
        torch.cuda.empty_cache()
        if isinstance(found, str):
            recorder.add("kernels", f"{title}, forward", tool, 0, "us", found)
            failed += [f"{title}: {found}"] if tool.startswith(OURS) else []
            continue
        for name, timing, least in (
            ("forward", found[0], case.forward_bytes),
            ("forward and backward", found[1], case.forward_bytes + case.backward_bytes),
        ):
            note = _share(case, timing.seconds, least, ceilings, name)
            note += ", with its host synchronisations" if timing.synchronises else ""
            recorder.add("kernels", f"{title}, {name}", tool, timing.seconds * 1e6, "us", note)
    if failed:
        raise UserError(f"{OURS}, {failed[0]}")


def _gate_and_times(
    case: KernelCase, form: Form, device: torch.device, dtype: torch.dtype, timer: Timer
) -> tuple[Timing, Timing] | str:
    """Times of forward, and of forward with backward; or what is wrong with what it computes."""
    wrong = difference(case, form, device, dtype)
    if wrong > case.tolerance:
        return f"off by {wrong:.1e}: no speed is told"
    return times(case, form, device, dtype, timer)


def difference(case: KernelCase, form: Form, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference of output and gradients from the reference's, over the largest value of each."""
    worst = 0.0
    upstream: torch.Tensor | None = None
    expected: list[torch.Tensor] = []
    for number, compute in enumerate((case.reference, form)):
        inputs = case.make(torch.Generator(device).manual_seed(0), dtype)
        out = compute(inputs)
        if out.dim() == 0 and number:
            expected[0] = expected[0].sum()
        if upstream is None:
            upstream = torch.ones_like(out)
        gradients = torch.autograd.grad(
            out, [inputs[name] for name in case.wanted], upstream.to(out.dtype) if out.dim() else None
        )
        found = [tensor.detach().float() for tensor in (out, *gradients)]
        if not number:
            expected = found
            continue
        for one, other in zip(expected, found, strict=True):
            off = float((one - other).abs().max() / one.abs().max().clamp(min=1e-30))
            worst = max(worst, math.inf if math.isnan(off) else off)
    return worst


def times(
    case: KernelCase, form: Form, device: torch.device, dtype: torch.dtype, timer: Timer
) -> tuple[Timing, Timing]:
    """Times of forward, and of forward with backward."""
    generator = torch.Generator(device).manual_seed(1)
    sets = [case.make(generator, dtype)]
    size = sum(value.numel() * value.element_size() for value in sets[0].values())
    sets += [case.make(generator, dtype) for _ in range(min(CALLS, 1 + CACHE_BYTES // size) - 1)]

    def forward(inputs: Inputs) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return form(inputs)

        return call

    def both(inputs: Inputs) -> Callable[[], object]:
        out = form(inputs)
        # Not of the default generator, which a graph whose capture failed leaves unusable.
        upstream = torch.rand(out.shape, dtype=out.dtype, device=device, generator=generator)

        def call() -> object:
            return torch.autograd.grad(form(inputs), [inputs[name] for name in case.wanted], upstream)

        return call

    return timer([forward(inputs) for inputs in sets]), timer([both(inputs) for inputs in sets])


def seconds_on_device(calls: Sequence[Callable[[], object]]) -> Timing:
    """Times one call in a replayed CUDA graph of all of them; between events, if they wait for the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [*calls, *calls]:
            call()
        waits = synchronises(calls)
    torch.cuda.current_stream().wait_stream(stream)
    if waits:
        return Timing(seconds_between_events(calls, REPLAYS), synchronises=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Kept, so that no call writes where another has, in memory that is in the cache.
        kept = [call() for call in calls]
    found = seconds_between_events([graph.replay], REPLAYS) / len(calls)
    del kept
    return Timing(found)


def synchronises(calls: Iterable[Callable[[], object]]) -> bool:
    """Whether one of these calls, made once here, waits for the device: its capture in a graph would fail."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    except RuntimeError as error:
        if "called a synchronizing CUDA operation" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def _share(case: KernelCase, seconds: float, least: float, ceilings: Ceilings, name: str) -> str:
    if case.operations:
        if name == "forward":
            return f"{case.operations / 3 / seconds / ceilings.matmul:.0%} of the matmul rate"
        return f"{case.operations / seconds / ceilings.matmul:.0%} of the matmul rate, recomputation not counted"
    return f"{least / seconds / ceilings.copy:.0%} of the copy rate"
