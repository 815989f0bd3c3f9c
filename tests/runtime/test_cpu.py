"""The redirection of CUDA to the CPU, and that a GPU run is free of it."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager

from tests.ranks import run_ranks
from tests.train.memory_meter import allocated

REPOSITORY = Path(__file__).resolve().parents[2]
REDIRECTION = "megacpt.runtime.cpu"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which must not be redirected")


def redirected() -> dict[str, Any]:
    """Facts about torch after a second redirection of this process."""
    from megacpt.runtime.cpu import redirect_cuda

    redirect_cuda()
    functions = torch.empty, torch.Tensor.to, torch.cuda.current_device
    redirect_cuda()
    cuda = torch.device("cuda", 0)
    tensors = {
        "string": torch.zeros(2, device="cuda"),
        "index": torch.ones(2, device="cuda:1"),
        "device": torch.full((2,), 3.0, device=cuda),
        "current": torch.arange(2, device=torch.cuda.current_device()),
        "pinned": torch.tensor([1, 2], device="cpu", pin_memory=True).cuda(non_blocking=True),
        "like": torch.empty_like(torch.ones(2), device=cuda),
        "to": torch.ones(2).to("cuda", torch.float64),
        "to_keyword": torch.ones(2).to(device=cuda),
        "cuda": torch.ones(2).cuda(),
        "module": torch.nn.Linear(2, 2).to(cuda).weight,
    }
    with torch.cuda.stream(torch.cuda.Stream()):
        event = torch.cuda.Event()
        event.record()
        torch.cuda.current_stream().wait_event(event)
        torch.cuda.synchronize()
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    return {
        "idempotent": functions == (torch.empty, torch.Tensor.to, torch.cuda.current_device),
        "devices": {name: tensor.device.type for name, tensor in tensors.items()},
        "dtype": tensors["to"].dtype,
        "type": torch.ones(2).type(),
        "half": torch.ones(2, dtype=torch.bfloat16).type(),
        "cast": torch.ones(2).type(torch.int64).dtype,
        "meta": torch.ones(2, device="meta").device.type,
        "same_draw": torch.equal(first, torch.rand(4)),
        "event": event.query(),
    }


@no_gpu
def test_cuda_means_the_cpu():
    [facts] = run_ranks(redirected, 1)
    assert set(facts.pop("devices").values()) == {"cpu"}
    assert facts == {
        "idempotent": True,
        "dtype": torch.float64,
        "type": "torch.cuda.FloatTensor",
        "half": "torch.cuda.BFloat16Tensor",
        "cast": torch.int64,
        "meta": "meta",
        "same_draw": True,
        "event": True,
    }


def redirect_where_a_gpu_is() -> str:
    """What the redirection says on a machine with a GPU."""
    from megacpt.runtime.cpu import redirect_cuda

    with patch.object(torch.cuda, "is_available", return_value=True):
        try:
            redirect_cuda()
        except AssertionError as error:
            return str(error)
    return "nothing"


def test_a_gpu_is_never_hidden():
    assert run_ranks(redirect_where_a_gpu_is, 1) == ["the CPU redirection must not be entered where there is a GPU"]


class ReachedError(Exception):
    """The GPU branch of the set-up was taken."""


def set_up_where_a_gpu_is() -> bool:
    """Whether the redirection is loaded once the set-up has chosen a GPU."""
    from megacpt.runtime.setup import Layout, setup

    with (
        patch.object(torch.cuda, "is_available", return_value=True),
        patch.object(torch.cuda, "set_device", side_effect=ReachedError),
        pytest.raises(ReachedError),
    ):
        setup(Layout(1), 1)
    return REDIRECTION in sys.modules


def test_a_gpu_run_never_loads_the_redirection():
    assert run_ranks(set_up_where_a_gpu_is, 1) == [False]


def test_nothing_else_loads_the_redirection():
    """Every other module of the package, imported in one process, leaves it out."""
    code = f"""
import importlib, pkgutil, sys, megacpt
names = [m.name for m in pkgutil.walk_packages(megacpt.__path__, "megacpt.")]
for name in names:
    if name not in ({REDIRECTION!r}, "megacpt.train.__main__"):
        importlib.import_module(name)
assert {REDIRECTION!r} in names
assert "megacpt.train.job" in sys.modules
assert {REDIRECTION!r} not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=REPOSITORY)


def test_it_is_imported_in_one_place_under_the_branch_without_a_gpu():
    importers = []
    for path in sorted((REPOSITORY / "megacpt").rglob("*.py")):
        for branch in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.If)):
            if "is_available" in ast.unparse(branch.test):
                importers += [path.name for node in branch.orelse for n in ast.walk(node) if _imports_it(n)]
    everywhere = [
        path.name
        for path in sorted((REPOSITORY / "megacpt").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if _imports_it(node)
    ]
    assert everywhere == importers == ["setup.py"]


def _imports_it(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module == REDIRECTION or (
            node.module == "megacpt.runtime" and any(n.name == "cpu" for n in node.names)
        )
    return isinstance(node, ast.Import) and any(name.name == REDIRECTION for name in node.names)


@no_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_gradient_is_added_to_its_buffer(dtype: torch.dtype) -> None:
    from megacpt.runtime.cpu import _add_weight_gradient

    inputs, gradients, buffer = torch.randn(7, 3).to(dtype), torch.randn(7, 5).to(dtype), torch.randn(5, 3)
    expected = buffer + (gradients.t() @ inputs).float()
    _add_weight_gradient(inputs, gradients, buffer)
    assert torch.allclose(buffer, expected, atol=1e-6)


@no_gpu
def test_a_weight_gradient_is_widened_in_parts() -> None:
    from megacpt.runtime.cpu import ADDED_AT_ONCE, _add_weight_gradient

    rows = 10 * ADDED_AT_ONCE // 64 + 1
    inputs, gradients = torch.randn(4, 64).bfloat16(), torch.randn(4, rows).bfloat16()
    buffer = torch.randn(rows, 64)
    expected = buffer + gradients.t() @ inputs
    product = rows * 64 * 2
    assert product <= allocated(lambda: _add_weight_gradient(inputs, gradients, buffer)) <= product + 4 * ADDED_AT_ONCE
    assert torch.equal(buffer, expected)


def exchanged(overlaps: bool) -> dict[str, Any]:
    """Two buckets' gradients and parameters through megatron-core's functions, beside torch's own."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    from megacpt.runtime.cpu import redirect_cuda

    reduce_scatter, all_gather = buffers.dist_reduce_scatter_func, buffers.dist_all_gather_func
    assert (reduce_scatter, all_gather) == (dist.reduce_scatter_tensor, dist.all_gather_into_tensor)
    redirect_cuda()
    torch.manual_seed(dist.get_rank())
    group, ranks, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    drawn = [torch.randn(ranks, size) for size in (1000, 3000)]
    summed = [torch.empty(size) for size in (1000, 3000)]
    gathered = [torch.empty(ranks, size) for size in (1000, 3000)]
    for one, sums, all_ in zip(drawn, summed, gathered, strict=True):
        reduce_scatter(sums, one.flatten())
        all_gather(all_, one[rank : rank + 1])
    gradients, parameters = ([one.clone() for one in drawn] for _ in range(2))

    def reduce() -> None:
        # With overlap each bucket has a group of its own.
        for together in [[one] for one in gradients] if overlaps else [gradients]:
            with _coalescing_manager(group, async_ops=overlaps) as handle:
                for whole in together:
                    buffers.dist_reduce_scatter_func(
                        whole[rank], whole.flatten(), op=dist.ReduceOp.SUM, group=group, async_op=overlaps
                    )
            if overlaps:
                handle.wait()

    def gather() -> None:
        with _coalescing_manager(group, async_ops=overlaps) as handle:
            for whole in parameters:
                buffers.dist_all_gather_func(whole.flatten(), whole[rank], group=group, async_op=overlaps)
        if overlaps:
            handle.wait()

    return {
        "allocated": allocated(lambda: (reduce(), gather())),
        "summed": all(torch.equal(whole[rank], sums) for whole, sums in zip(gradients, summed, strict=True)),
        "gathered": all(map(torch.equal, parameters, gathered)),
    }


@no_gpu
@pytest.mark.parametrize("overlaps", [False, True])
def test_the_distributed_optimizer_s_collectives_work_where_tensors_lie(overlaps: bool) -> None:
    """Sums are those of torch's reduce-scatter to the bit."""
    for facts in run_ranks(exchanged, 3, overlaps):
        assert facts["allocated"] < 4 * 1000
        assert facts["summed"]
        assert facts["gathered"]


@no_gpu
def test_gradients_are_scaled_where_they_are() -> None:
    from megacpt.runtime.cpu import _scale

    gradients = [torch.ones(3), torch.full((2, 2), 4.0)]
    places = [gradient.data_ptr() for gradient in gradients]
    _scale(1, torch.zeros(1), [gradients, gradients], 0.5)
    assert [gradient.unique().item() for gradient in gradients] == [0.5, 2.0]
    assert [gradient.data_ptr() for gradient in gradients] == places
