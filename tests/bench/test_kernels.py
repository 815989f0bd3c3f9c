"""The gate and the rows on a CPU, where kernels are their references, with a clock in the place of a GPU's."""

import time
from dataclasses import replace

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

CASES = [
    norm_case(64, 96),
    swiglu_case(32, 48),
    rope_case(32, 4, 16),
    cross_entropy_case(16, 300),
    linear_cross_entropy_case(16, 24, 300),
]
CPU = torch.device("cpu")


def by_clock(calls):
    began = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - began) / len(calls)


def without_compile(case):
    return replace(case, forms={tool: form for tool, form in case.forms.items() if tool != "torch.compile"})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_forms_compute_the_same(case, dtype):
    for tool, form in without_compile(case).forms.items():
        assert kernels.difference(case, form, CPU, dtype) < (1e-5 if dtype is torch.float32 else 1e-2), tool


def test_rows(monkeypatch):
    monkeypatch.setattr(kernels, "CACHE_BYTES", 1)
    recorder = Recorder("here", [], "now", "abc")
    kernels.measure(recorder, [without_compile(case) for case in CASES[:2]], CPU, torch.float32, by_clock)
    ours = [row for row in recorder.rows if row.tool == OURS]
    assert [row.case.rpartition(", ")[2] for row in ours] == ["forward", "forward and backward"] * 2
    assert all(row.value > 0 and "of the copy rate" in row.note for row in ours)


def test_who_computes_something_else_or_fails_has_no_speed():
    def fails(inputs):
        raise RuntimeError("no such device\nand more")

    case = replace(CASES[0], forms={"wrong": lambda i: i["x"] * i["weight"], "broken": fails})
    recorder = Recorder("here", [], "now", "abc")
    kernels.measure(recorder, [case], CPU, torch.float32, by_clock)
    assert [(row.tool, row.value) for row in recorder.rows] == [("wrong", 0), ("broken", 0)]
    assert recorder.rows[0].note.startswith("off by ")
    assert recorder.rows[1].note == "did not run: no such device"


def test_every_operation_with_a_launch_is_tuned():
    with torch.device("meta"):
        names = {name for name, _, _ in works(torch.device("meta"))}
    assert names == {
        "rms_norm_forward",
        "rms_norm_backward",
        "swiglu_forward",
        "swiglu_backward",
        "rope",
        "cross_entropy_statistics",
        "cross_entropy_gradient",
    }
