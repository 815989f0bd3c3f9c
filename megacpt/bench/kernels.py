"""Kernels beside those of others: time on the device, and the share of what it does at best.

Gate first: whoever's outputs or gradients are not the reference's has no speed. Then a CUDA graph of several calls, all
on inputs of their own so that none is in the cache, is replayed: it measures the device, not the launching.
"""

from collections.abc import Callable, Sequence
from statistics import median

import torch

from megacpt.bench.ceilings import Ceilings, measure_ceilings
from megacpt.bench.kernel_cases import Form, Inputs, KernelCase
from megacpt.bench.rows import Recorder

CACHE_BYTES = 256 << 20
"""Inputs of the calls in a graph are at least as large together: several times an H100's L2."""
CALLS = 4
REPLAYS = 20

Timer = Callable[[Sequence[Callable[[], object]]], float]
"""Seconds on the device of one of several calls."""


def measure(
    recorder: Recorder,
    cases: Sequence[KernelCase],
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer | None = None,
) -> None:
    """Rows of these cases: forward, and forward with backward."""
    ceilings = measure_ceilings(device, dtype)
    timer = timer or seconds_on_device
    for case in cases:
        for tool, form in case.forms.items():
            title = f"{case.name}, {case.size}, {str(dtype).removeprefix('torch.')}"
            try:
                wrong = difference(case, form, device, dtype)
                if wrong > case.tolerance:
                    recorder.add("kernels", f"{title}, forward", tool, 0, "us", f"off by {wrong:.1e}: no speed is told")
                    continue
                forward, both = times(case, form, device, dtype, timer)
            except (RuntimeError, TypeError, ValueError) as error:
                recorder.add("kernels", f"{title}, forward", tool, 0, "us", f"did not run: {_first_line(error)}")
                continue
            finally:
                torch.cuda.empty_cache()
            for name, seconds, least in (
                ("forward", forward, case.forward_bytes),
                ("forward and backward", both, case.forward_bytes + case.backward_bytes),
            ):
                note = _share(case, seconds, least, ceilings, name)
                recorder.add("kernels", f"{title}, {name}", tool, seconds * 1e6, "us", note)


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
            worst = max(worst, float((one - other).abs().max() / one.abs().max().clamp(min=1e-30)))
    return worst


def times(case: KernelCase, form: Form, device: torch.device, dtype: torch.dtype, timer: Timer) -> tuple[float, float]:
    """Seconds of forward, and of forward with backward."""
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
        shape = form(inputs)
        upstream = torch.rand_like(shape)

        def call() -> object:
            return torch.autograd.grad(form(inputs), [inputs[name] for name in case.wanted], upstream)

        return call

    return timer([forward(inputs) for inputs in sets]), timer([both(inputs) for inputs in sets])


def seconds_on_device(calls: Sequence[Callable[[], object]]) -> float:
    """One call's time in a replayed CUDA graph of all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [*calls, *calls]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    found = []
    for _ in range(REPLAYS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        found.append(began.elapsed_time(ended) / 1e3 / len(calls))
    return median(found)


def _share(case: KernelCase, seconds: float, least: float, ceilings: Ceilings, name: str) -> str:
    if case.operations:
        if name == "forward":
            return f"{case.operations / 3 / seconds / ceilings.matmul:.0%} of the matmul rate"
        return f"{case.operations / seconds / ceilings.matmul:.0%} of the matmul rate, recomputation not counted"
    return f"{least / seconds / ceilings.copy:.0%} of the copy rate"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:120]
