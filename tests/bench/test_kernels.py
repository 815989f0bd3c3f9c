"""The gate and the rows on a CPU, where kernels are their references, with a clock in the place of a GPU's."""

import importlib
import time
from dataclasses import replace

import pytest
import torch
import triton

from megacpt.bench import kernels
from megacpt.bench.kernel_cases import (
    add_peer,
    cross_entropy_case,
    linear_cross_entropy_case,
    norm_case,
    rope_case,
    swiglu_case,
    with_own_weight,
)
from megacpt.bench.rows import OURS, Recorder
from megacpt.errors import UserError

CASES = {
    "RMSNorm": lambda: norm_case(64, 96),
    "SwiGLU": lambda: swiglu_case(32, 48),
    "RoPE": lambda: rope_case(32, 4, 16),
    "cross-entropy": lambda: cross_entropy_case(16, 300),
    "linear cross-entropy": lambda: linear_cross_entropy_case(16, 24, 300),
}
"""Made by each test: a peer's form may take memory of a GPU."""
CPU = torch.device("cpu")


def by_clock(calls):
    began = time.perf_counter()
    for call in calls:
        call()
    return kernels.Timing((time.perf_counter() - began) / len(calls))


def norm(**changes):
    """On a CPU, with other fields."""
    return replace(on_a_cpu(CASES["RMSNorm"]()), **changes)


def on_a_cpu(case):
    """Without forms that are compiled, or have kernels of a GPU alone."""
    there = (OURS, f"{OURS}, sum", "torch", "megatron-core")
    return replace(case, forms={tool: form for tool, form in case.forms.items() if tool in there})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_forms_compute_the_same(name, dtype):
    case = on_a_cpu(CASES[name]())
    assert case.name == name
    for tool, form in case.forms.items():
        assert kernels.difference(case, form, CPU, dtype) < (1e-5 if dtype is torch.float32 else 1e-2), tool


def test_rows(monkeypatch):
    monkeypatch.setattr(kernels, "CACHE_BYTES", 1)
    recorder = Recorder("here", [], "now", "abc")
    kernels.measure(recorder, [on_a_cpu(CASES[name]()) for name in ("RMSNorm", "SwiGLU")], CPU, torch.float32, by_clock)
    ours = [row for row in recorder.rows if row.tool == OURS]
    assert [row.case.rpartition(", ")[2] for row in ours] == ["forward", "forward and backward"] * 2
    assert all(row.value > 0 and "of the copy rate" in row.note for row in ours)


def raising(error):
    def form(inputs):
        raise error

    return form


def test_who_computes_something_else_or_fails_has_no_speed():
    """Whatever it raises, and the others are measured."""
    forms = {
        "wrong": lambda i: i["x"] * i["weight"],
        "nothing": lambda i: i["x"] * i["weight"] * float("nan"),
        "broken": raising(RuntimeError("no such device\nand more")),
        "asserts": raising(AssertionError()),
        "too large": raising(triton.runtime.errors.OutOfResources(2, 1, "shared memory")),
        "another version": raising(AttributeError("no such function")),
        "torch": norm().forms["torch"],
    }
    recorder = Recorder("here", [], "now", "abc")
    kernels.measure(recorder, [norm(forms=forms)], CPU, torch.float32, by_clock)
    assert [row.tool for row in recorder.rows if row.value == 0] == list(forms)[:-1]
    assert [row.tool for row in recorder.rows if row.value > 0] == ["torch", "torch"]
    notes = [row.note for row in recorder.rows]
    assert [note.startswith("off by ") for note in notes[:3]] == [True, True, False]
    assert notes[2] == "did not run: RuntimeError: no such device"
    assert notes[3].startswith("did not run: AssertionError")
    assert notes[4].startswith("did not run: OutOfResources: out of resource: shared memory")


def test_a_failure_of_ours_ends_the_run_when_the_rest_is_measured():
    forms = {OURS: raising(AssertionError("oh")), "torch": norm().forms["torch"]}
    recorder = Recorder("here", [], "now", "abc")
    with pytest.raises(UserError, match="megacpt, RMSNorm, 64 x 96, float32: did not run: AssertionError: oh"):
        kernels.measure(recorder, [norm(forms=forms)], CPU, torch.float32, by_clock)
    assert [row.tool for row in recorder.rows] == [OURS, "torch", "torch"]


def test_a_peer_that_is_installed_and_does_not_import_is_told(tmp_path, monkeypatch):
    (tmp_path / "brokenpeer.py").write_text("raise OSError('libcudart.so.12: not found')")
    monkeypatch.syspath_prepend(tmp_path)
    forms = {}
    add_peer(forms, "absent", "nosuchpeer", lambda: importlib.import_module("nosuchpeer").form)
    add_peer(forms, "broken", "brokenpeer", lambda: importlib.import_module("brokenpeer").form)
    recorder = Recorder("here", [], "now", "abc")
    kernels.measure(recorder, [norm(forms=forms)], CPU, torch.float32, by_clock)
    (row,) = recorder.rows
    assert (row.tool, row.note) == ("broken", "did not run: ImportError: OSError: libcudart.so.12: not found")


def test_who_waits_for_its_host_is_told_with_its_time():
    recorder = Recorder("here", [], "now", "abc")
    case = norm(forms={"torch": norm().forms["torch"]})
    kernels.measure(recorder, [case], CPU, torch.float32, lambda calls: kernels.Timing(1.0, synchronises=True))
    assert [row.note.rpartition(", ")[2] for row in recorder.rows] == ["with its host synchronisations"] * 2


def test_calls_that_wait_are_found(monkeypatch):
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    waits, fails = RuntimeError("called a synchronizing CUDA operation"), RuntimeError("out of memory")
    assert not kernels.synchronises([lambda: None])
    assert kernels.synchronises([lambda: None, lambda: raising(waits)({})])
    with pytest.raises(RuntimeError, match="out of memory"):
        kernels.synchronises([lambda: raising(fails)({})])
    assert modes == [0, *["error", 0] * 3]


def test_no_kernel_is_begun_when_the_time_is_up():
    recorder = Recorder("here", [], "now", "abc")
    kernels.measure(recorder, [norm()], CPU, torch.float32, by_clock, deadline=0.0)
    assert {row.note for row in recorder.rows} == {"not measured: the time was up"}


def test_a_module_that_reads_its_weight_again_has_the_gradients_of_the_inputs():
    """As Transformer Engine's does in its backward."""

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, module):
            ctx.module = module
            ctx.save_for_backward(x)
            return x * weight

        @staticmethod
        def backward(ctx, upstream):
            (x,) = ctx.saved_tensors
            return upstream * ctx.module.weight, (upstream * x).sum(0), None

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(96))

        def forward(self, x):
            return Scale.apply(x, self.weight, self)

    case = norm(reference=lambda i: i["x"] * i["weight"])
    assert kernels.difference(case, with_own_weight(Module()), CPU, torch.float32) < 1e-6
