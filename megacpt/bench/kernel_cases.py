"""The operations of `bench.py kernels`: ours and everybody else's form of each, on inputs of the same shape.

A form takes the inputs and returns what is differentiated; its gradients are those of the inputs that require one.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from megacpt.bench.rows import OURS
from megacpt_kernels.cross_entropy import cross_entropy_reference, vocab_parallel_cross_entropy
from megacpt_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_cross_entropy_sum,
)
from megacpt_kernels.rmsnorm import rms_norm, rms_norm_reference
from megacpt_kernels.rope import rope, rope_reference
from megacpt_kernels.swiglu import swiglu, swiglu_reference

Inputs = dict[str, Any]
Form = Callable[[Inputs], torch.Tensor]
EPS = 1e-5


@dataclass(frozen=True)
class KernelCase:
    """One operation at one size.

    Attributes:
        make: inputs from a generator and a dtype.
        reference: the operation in fp32 arithmetic, for the gate.
        forms: by tool; ours is among them.
        forward_bytes, backward_bytes: the least that has to move, for inputs of 2 bytes an element.
        operations: floating-point operations of forward and backward, where those are the limit.
    """

    name: str
    size: str
    make: Callable[[torch.Generator, torch.dtype], Inputs]
    reference: Form
    forms: Mapping[str, Form]
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    operations: float = 0.0
    tolerance: float = 2e-2
    wanted: tuple[str, ...] = field(default=("x",))


def add_peer(forms: dict[str, Form], tool: str, package: str, make: Callable[[], Form]) -> None:
    """Add a peer's form, made by `make`, if its package is installed; if it cannot be made, one that says why.

    A package may be installed and not import: built for another torch, for instance.
    """
    if importlib.util.find_spec(package) is None:
        return
    try:
        forms[tool] = make()
    except Exception as error:
        forms[tool] = _unmade(f"{type(error).__name__}: {error}")


def _unmade(problem: str) -> Form:
    def form(_: Inputs) -> torch.Tensor:
        raise ImportError(problem)

    return form


def compiled(form: Form) -> Form:
    """The form through torch.compile, which compiles at its first call."""
    return torch.compile(form, dynamic=False)


def with_own_weight(module: torch.nn.Module) -> Form:
    """A module's form on the inputs' weight.

    Not by `functional_call`, which puts the module's own back after the forward: Transformer Engine's backward reads
    the weight from the module once more.
    """

    def form(inputs: Inputs) -> torch.Tensor:
        module._parameters["weight"] = inputs["weight"]
        return module(inputs["x"])

    return form


def norm_case(rows: int, width: int) -> KernelCase:
    """RMSNorm of [rows, width]."""

    def make(generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        device = generator.device
        x = torch.randn(rows, width, generator=generator, device=device).to(dtype).requires_grad_()
        weight = torch.rand(width, generator=generator, device=device).to(dtype).requires_grad_()
        return {"x": x, "weight": weight}

    def eager(inputs: Inputs) -> torch.Tensor:
        return F.rms_norm(inputs["x"], (width,), inputs["weight"], EPS)

    forms: dict[str, Form] = {
        OURS: lambda i: rms_norm(i["x"], i["weight"], EPS),
        "torch": eager,
        "torch.compile": compiled(lambda i: rms_norm_reference(i["x"], i["weight"], EPS)),
    }

    def liger() -> Form:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return lambda i: LigerRMSNormFunction.apply(i["x"], i["weight"], EPS)

    def engine() -> Form:
        import transformer_engine.pytorch as te

        return with_own_weight(te.RMSNorm(width, eps=EPS, params_dtype=torch.bfloat16))

    add_peer(forms, "Liger", "liger_kernel", liger)
    add_peer(forms, "Transformer Engine", "transformer_engine", engine)
    one = rows * width * 2.0
    return KernelCase(
        "RMSNorm", f"{rows:,} x {width:,}", make, lambda i: rms_norm_reference(i["x"], i["weight"], EPS), forms,
        2 * one, 3 * one, wanted=("x", "weight"),
    )  # fmt: skip


def swiglu_case(rows: int, width: int) -> KernelCase:
    """SwiGLU of fused gate and up, [rows, 2 x width]."""

    def make(generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        x = torch.randn(rows, 2 * width, generator=generator, device=generator.device).to(dtype)
        return {"x": x.requires_grad_()}

    def eager(inputs: Inputs) -> torch.Tensor:
        gate, up = inputs["x"].chunk(2, dim=-1)
        return F.silu(gate) * up

    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    forms: dict[str, Form] = {
        OURS: lambda i: swiglu(i["x"]),
        "torch": eager,
        "torch.compile": compiled(eager),
        "megatron-core": lambda i: bias_swiglu_impl(i["x"], None),
    }

    def liger() -> Form:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return lambda i: LigerSiLUMulFunction.apply(*(part.contiguous() for part in i["x"].chunk(2, dim=-1)))

    add_peer(forms, "Liger, gate and up copied apart", "liger_kernel", liger)
    one = rows * width * 2.0
    return KernelCase(
        "SwiGLU", f"{rows:,} x {width:,}", make, lambda i: swiglu_reference(i["x"]), forms, 3 * one, 5 * one
    )


def rope_case(tokens: int, heads: int, channels: int) -> KernelCase:
    """RoPE of [tokens, 1, heads, channels]."""

    def make(generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        device = generator.device
        x = torch.randn(tokens, 1, heads, channels, generator=generator, device=device).to(dtype)
        rates = 1e4 ** -(torch.arange(0, channels, 2, device=device) / channels)
        angles = torch.outer(torch.arange(tokens, device=device).float(), rates)
        return {"x": x.requires_grad_(), "phases": torch.cat([angles, angles], -1)[:, None, None]}

    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    def eager(inputs: Inputs) -> torch.Tensor:
        return _apply_rotary_pos_emb_bshd(inputs["x"], inputs["phases"], rotary_interleaved=False)

    forms: dict[str, Form] = {
        OURS: lambda i: rope(i["x"], i["phases"]),
        "megatron-core": eager,
        "torch.compile": compiled(eager),
    }
    one = 2.0 * tokens * heads * channels * 2
    return KernelCase(
        "RoPE", f"{tokens:,} x {heads} x {channels}", make, lambda i: rope_reference(i["x"], i["phases"]), forms,
        one, one,
    )  # fmt: skip


def cross_entropy_case(tokens: int, vocabulary: int) -> KernelCase:
    """Cross-entropy of logits [tokens, vocabulary]."""

    def make(generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        device = generator.device
        # A model's logits come from a matmul in its dtype, and are overwritten: no leaf.
        logits = torch.randn(tokens, vocabulary, generator=generator, device=device, dtype=dtype).requires_grad_()
        targets = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
        return {"x": logits, "targets": targets}

    def eager(inputs: Inputs) -> torch.Tensor:
        return F.cross_entropy(inputs["x"].float(), inputs["targets"], reduction="none")

    forms: dict[str, Form] = {
        OURS: lambda i: vocab_parallel_cross_entropy(i["x"].view_as(i["x"]), i["targets"]),
        "torch": eager,
        "torch.compile": compiled(eager),
    }

    def liger() -> Form:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        return lambda i: LigerCrossEntropyFunction.apply(
            i["x"].view_as(i["x"]), i["targets"], None, -100, 0.0, 0.0, "none"
        )[0]

    add_peer(forms, "Liger", "liger_kernel", liger)
    if parallel_state.model_parallel_is_initialized():
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy as unfused

        group = parallel_state.get_tensor_model_parallel_group()
        # Logits [s, b, V]; both make an fp32 copy of bf16 ones.
        forms["megatron-core"] = lambda i: unfused(i["x"][:, None], i["targets"][:, None])[:, 0]
        forms["megatron-core, fused"] = lambda i: fused_vocab_parallel_cross_entropy(
            i["x"][:, None], i["targets"][:, None], group
        )[:, 0]
    one = tokens * vocabulary * 2.0
    return KernelCase(
        "cross-entropy", f"{tokens:,} x {vocabulary:,}", make, lambda i: cross_entropy_reference(i["x"], i["targets"]),
        forms, one, 2 * one,
    )  # fmt: skip


def linear_cross_entropy_case(tokens: int, width: int, vocabulary: int) -> KernelCase:
    """Cross-entropy of hidden states [tokens, width] through an output layer [vocabulary, width]."""

    def make(generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        device = generator.device
        hidden = torch.randn(tokens, width, generator=generator, device=device, dtype=dtype)
        weight = torch.randn(vocabulary, width, generator=generator, device=device, dtype=dtype) / width**0.5
        targets = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
        return {"x": hidden.requires_grad_(), "weight": weight.requires_grad_(), "targets": targets}

    def eager(inputs: Inputs) -> torch.Tensor:
        return F.cross_entropy((inputs["x"] @ inputs["weight"].t()).float(), inputs["targets"], reduction="none")

    forms: dict[str, Form] = {
        OURS: lambda i: linear_cross_entropy(i["x"], i["weight"], i["targets"]),
        f"{OURS}, sum": lambda i: linear_cross_entropy_sum(
            i["x"], i["weight"], i["targets"], torch.ones_like(i["targets"])
        )[0],
        "torch": eager,
        "torch.compile": compiled(eager),
    }

    def liger() -> Form:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        return lambda i: LigerFusedLinearCrossEntropyFunction.apply(
            i["x"], i["weight"], i["targets"], None, None, -100, 0.0, 0.0, "sum"
        )[0]

    add_peer(forms, "Liger, sum", "liger_kernel", liger)
    return KernelCase(
        "linear cross-entropy", f"{tokens:,} x {width:,} x {vocabulary:,}", make,
        lambda i: linear_cross_entropy_reference(i["x"], i["weight"], i["targets"]), forms,
        operations=6.0 * tokens * width * vocabulary, wanted=("x", "weight"),
    )  # fmt: skip


def gpu_cases() -> list[KernelCase]:
    """The sizes that others have published rows of."""
    return [
        norm_case(4096, 4096),
        norm_case(8192, 8192),
        swiglu_case(8192, 16_384),
        rope_case(8192, 32, 128),
        cross_entropy_case(8192, 131_072),
        linear_cross_entropy_case(8192, 4096, 131_072),
    ]
