"""The kernels' gate, timer and tuner on a GPU: what `bench.py kernels` stands on."""

import pytest
import torch

from megacpt.bench import kernels
from megacpt.bench.kernel_cases import (
    cross_entropy_case,
    linear_cross_entropy_case,
    norm_case,
    rope_case,
    swiglu_case,
)
from megacpt.bench.rows import OURS, Recorder
from megacpt.bench.tuning import works
from megacpt_kernels.launch import candidates, launch_for, tune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CASES = {
    "norm": lambda: norm_case(512, 1024),
    "swiglu": lambda: swiglu_case(256, 1536),
    "rope": lambda: rope_case(512, 8, 64),
    "cross-entropy": lambda: cross_entropy_case(256, 32_000),
    "linear cross-entropy": lambda: linear_cross_entropy_case(256, 512, 32_000),
}


@pytest.mark.parametrize("name", CASES)
def test_every_contestant_passes_the_gate_and_is_timed(name: str) -> None:
    """Peers too: one that does not run is a row that says so, which here is a failure."""
    recorder, case = Recorder("here", [], "now", "abc"), CASES[name]()
    kernels.measure(recorder, [case], torch.device("cuda"), torch.bfloat16)
    told = [f"{row.tool}: {row.note}" for row in recorder.rows if not row.value > 0]
    assert not told
    assert {row.tool for row in recorder.rows} == set(case.forms)
    assert OURS in case.forms


def test_every_operation_can_be_tuned() -> None:
    import triton

    for operation, width, work in works(torch.device("cuda")):
        start = launch_for(operation, width, 2, torch.device("cuda", 0))
        tune(work, [start, candidates(start)[-1]], triton.testing.do_bench_cudagraph)
