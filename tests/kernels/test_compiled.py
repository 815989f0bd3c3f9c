"""Every kernel compiled for an H100 without one: as launched at real sizes, with wide loads and no spilled registers.

The host functions run on tensors whose memory nobody touches; in place of a launch, the kernel is compiled with the
types, constants and alignment that Triton would find in its arguments.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megacpt_kernels import rmsnorm, rope, swiglu, token_losses, vocabulary
from megacpt_kernels.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}
MODULES = (rmsnorm, rope, swiglu, token_losses, vocabulary)
KERNELS = [
    (module, name)
    for module in MODULES
    for name, value in vars(module).items()
    if name.endswith("_kernel") and isinstance(value, triton.runtime.JITFunction)
]


class Compiled:
    """Stands in for a kernel: what would be launched is compiled, and its PTX and resources kept."""

    def __init__(self, kernel: triton.runtime.JITFunction) -> None:
        self.kernel = kernel
        self.ptx: list[str] = []
        self.stack: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *arguments: Any, **keywords: Any) -> None:
        names = self.kernel.arg_names
        values = dict(zip(names, arguments, strict=False)) | {k: v for k, v in keywords.items() if k in names}
        signature, constants, attributes = {}, {}, {}
        for index, name in enumerate(names):
            value = values[name]
            if self.kernel.params[index].is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[(index,)] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name] = f"*{TYPES[value.dtype]}"
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i64" if value >= 2**31 else "i32"
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        options = {k: v for k, v in keywords.items() if k not in names}
        source = ASTSource(self.kernel, signature, constants, attributes)
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        self.ptx.append(binary.asm["ptx"])
        self.stack.append(stack_bytes(binary.asm["cubin"]))


def stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory that each thread needs, where registers are spilled to."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", listing)[-1])


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Compiled]:
    torch.use_deterministic_algorithms(False)  # which would fill gigabytes with NaN
    monkeypatch.setattr(rmsnorm, "multiprocessors", lambda _: 132)
    for module in (token_losses, vocabulary):
        monkeypatch.setattr(module, "runs_triton", lambda *_: True)
    stands = {}
    for module, name in KERNELS:
        stands[key(module, name)] = Compiled(getattr(module, name))
        monkeypatch.setattr(module, name, stands[key(module, name)])
    return stands


def key(module: ModuleType, name: str) -> str:
    return module.__name__.rpartition(".")[2] + name


def bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def all_accesses_are_wide(ptx: str, accesses: int) -> bool:
    """Whether at least `accesses` loads and stores of global memory move 16 bytes a thread, or go by cp.async of 16."""
    wide = re.findall(
        r"(?:ld|st)\.global[.\w:]*\.v4\.b32|cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx
    )
    return len(wide) >= accesses


@pytest.mark.parametrize("width", [576, 4096, 8192])
def test_rms_norm(compiled: dict[str, Compiled], width: int) -> None:
    x, weight, scale = bf16(4096, width), bf16(width), torch.empty(4096)
    rmsnorm.rms_norm_forward(x, None, weight, 1e-5)
    rmsnorm.rms_norm_forward(x, x, weight, 1e-5)
    rmsnorm.rms_norm_backward(x, x, x, weight, scale)
    for name, accesses in (("rmsnorm_forward_kernel", 3), ("rmsnorm_backward_kernel", 4)):
        assert all(all_accesses_are_wide(ptx, accesses) for ptx in compiled[name].ptx)
        assert set(compiled[name].stack) == {0}


def test_swiglu(compiled: dict[str, Compiled]) -> None:
    x = bf16(8192, 2 * 16384)
    swiglu.swiglu_backward(swiglu.swiglu_forward(x), x)
    for name, accesses in (("swiglu_forward_kernel", 3), ("swiglu_backward_kernel", 5)):
        assert all_accesses_are_wide(compiled[name].ptx[0], accesses)
        assert compiled[name].stack == [0]


@pytest.mark.parametrize("partial", [False, True])
def test_rope(compiled: dict[str, Compiled], partial: bool) -> None:
    x, phases = bf16(8192, 1, 32, 128), torch.empty(8192, 1, 64 if partial else 128)
    positions = torch.empty(8192, dtype=torch.int64) if partial else None
    for interleaved in (False, True):
        rope.rotate(x, bf16(*x.shape), phases, positions, interleaved=interleaved, mscale=1.0, backward=partial)
    assert all_accesses_are_wide(compiled["rope_rotate_kernel"].ptx[0], 4)
    assert max(compiled["rope_rotate_kernel"].stack) <= 32  # of the sine of large angles


@pytest.mark.parametrize(("columns", "real"), [(131072, 128256), (50304, 50257)])
def test_cross_entropy(compiled: dict[str, Compiled], columns: int, real: int) -> None:
    logits, targets = bf16(8192, columns), torch.empty(8192, dtype=torch.int64)
    shard = vocabulary.Shard.of(columns, real, None)
    local = vocabulary.statistics(logits, targets, shard)
    sources = token_losses.SourceSums.zeros(targets, 100)
    normaliser, losses = token_losses.token_losses(local[None], torch.empty(8192, dtype=torch.uint8), sources)
    vocabulary.logit_gradient_(logits, targets, normaliser, losses, shard)
    assert all_accesses_are_wide(compiled["vocabulary_statistics_kernel"].ptx[0], 2)
    assert all_accesses_are_wide(compiled["vocabulary_gradient_kernel"].ptx[0], 2)
    assert {stack for stand in compiled.values() for stack in stand.stack} == {0}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_sizes_and_other_types(compiled: dict[str, Compiled], size: int, dtype: torch.dtype) -> None:
    """Triton makes a constant of an argument that is 1, so that other code is compiled than for large sizes."""
    x, weight, scale = torch.empty(size, size, dtype=dtype), torch.empty(size), torch.empty(size)
    rmsnorm.rms_norm_forward(x, None if size == 1 else x, weight, 1e-5)
    rmsnorm.rms_norm_backward(x, None if size == 1 else x, x, weight, scale)
    wide = torch.empty(size, 2 * size, dtype=dtype)
    swiglu.swiglu_backward(swiglu.swiglu_forward(wide), wide)
    heads, phases = torch.empty(size, size, size, 2 * size, dtype=dtype), torch.empty(size, size, 2)
    positions = None if size == 1 else torch.empty(size, dtype=torch.int32)
    rope.rotate(heads, torch.empty_like(heads), phases, positions, interleaved=size == 1, mscale=1.0, backward=False)
    targets, mask = torch.empty(size, dtype=torch.int32), torch.empty(size, dtype=torch.uint8)
    shard = vocabulary.Shard(size, size - 1, size * (size - 1), None)
    ranks = vocabulary.statistics(x, targets, shard).expand(size, 3, size)
    sources = token_losses.SourceSums(targets, torch.zeros(2, size, dtype=torch.float64))
    normaliser, losses = token_losses.token_losses(ranks, None if size == 1 else mask, sources)
    token_losses.token_losses(ranks, mask)
    vocabulary.logit_gradient_(x, targets, normaliser, losses, shard)
    assert all(stand.ptx for stand in compiled.values())


def test_every_kernel_is_among_them() -> None:
    assert len(KERNELS) == 8
