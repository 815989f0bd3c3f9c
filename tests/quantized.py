"""A stand-in for Transformer Engine's FP8 parameters on a CPU: e4m3 with one scale for the whole tensor.

It behaves as the package's `QuantizedTensor` does: any operation sees dequantised values, `copy_` quantises anew, views
are refused, and the bytes lie wherever megatron-core's buffers put them. Quantising from main parameters is
`cast_master_weights_to_fp8` for current scaling: by way of bf16, with the largest magnitude over all shards.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import fp8_utils
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.transformer import transformer_block
from torch.utils._pytree import tree_map

import megacpt.model.build
from megacpt.config.tree import Config
from megacpt.model.gpt import LanguageModel
from megacpt.runtime.setup import setup
from megacpt.train.build import build_job
from megacpt.train.job import Job
from megacpt.train.planning import make_plan

LARGEST = 448.0
LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
aten = torch.ops.aten


def scale_of(largest: torch.Tensor) -> torch.Tensor:
    return torch.where(largest > 0, LARGEST / largest, 1.0)


def to_bytes(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values.float() * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)


class Quantized(torch.Tensor):
    """FP8 bytes and their scale, in the guise of a bf16 tensor."""

    _data: torch.Tensor
    _scale: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> "Quantized":
        made = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16, device=data.device)
        made._data, made._scale = data, scale
        return made

    @classmethod
    def of(cls, values: torch.Tensor) -> "Quantized":
        scale = scale_of(values.float().abs().max())
        return cls(to_bytes(values, scale), scale)

    def dequantize(self) -> torch.Tensor:
        return (self._data.view(torch.float8_e4m3fn).float() / self._scale).bfloat16()

    def float(self) -> torch.Tensor:
        return self.dequantize().float()

    @property
    def data(self) -> "Quantized":  # type: ignore[override]
        return Quantized(self._data, self._scale)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.detach.default:
            return Quantized(args[0]._data, args[0]._scale)
        if func is aten.copy_.default and isinstance(args[0], Quantized):
            whole = args[1].dequantize() if isinstance(args[1], Quantized) else args[1]
            args[0]._scale.copy_(scale_of(whole.float().abs().max()))
            args[0]._data.copy_(to_bytes(whole, args[0]._scale))
            return args[0]
        if func in (aten.view.default, aten.slice.Tensor) or func._schema.is_mutable:
            raise NotImplementedError(f"{func} of an FP8 parameter")
        plain = tree_map(lambda x: x.dequantize() if isinstance(x, Quantized) else x, (args, kwargs))
        return func(*plain[0], **plain[1])


def _move(tensor: torch.Tensor, buffer: torch.Tensor) -> None:
    parameter: Any = tensor
    buffer.copy_(parameter._data)
    parameter._data = buffer


def _cast(
    parameters: Sequence[Quantized],
    mains: Sequence[torch.Tensor | None],
    offsets: Sequence[int | None],
    group: dist.ProcessGroup,
    fsdp: object = None,
) -> None:
    for parameter, main, offset in zip(parameters, mains, offsets, strict=True):
        values = None if main is None else main.bfloat16()
        largest = torch.zeros(()) if values is None else values.float().abs().max()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        parameter._scale.copy_(scale_of(largest))
        if values is not None:
            assert offset is not None
            parameter._data.view(-1)[offset : offset + values.numel()] = to_bytes(values, parameter._scale).view(-1)


def _one_by_one(group: dist.ProcessGroup, async_ops: bool = False) -> Any:
    """gloo's coalesced all-gather mixes up tensors of different dtypes, which NCCL's does not."""
    assert not async_ops
    return nullcontext(SimpleNamespace(wait=lambda: None))


def _cast_in_forward(module: Any) -> None:
    """Let a linear layer multiply by its bf16 weight cast to FP8 anew each time, as `model.fp8` alone does."""
    multiply = module._forward_impl

    def forward(input: torch.Tensor, weight: torch.nn.Parameter, **kwargs: Any) -> torch.Tensor:
        cast = torch.nn.Parameter(Quantized.of(weight.detach()))
        cast.__dict__.update(weight.__dict__)
        return multiply(input=input, weight=cast, **kwargs)

    module._forward_impl = forward


def pretend(recipe: str) -> None:
    """Make megatron-core take `Quantized` for Transformer Engine's class, and give it to the layers' matrices."""
    patched: Any = fp8_utils
    patched.HAVE_TE_MXFP8TENSOR, patched.MXFP8Tensor = recipe == "mxfp8", Quantized
    patched.HAVE_TE_FP8_TENSOR_CLASS, patched.FP8_TENSOR_CLASS = True, Quantized
    patched._modify_underlying_storage_impl, patched._quantize_param_shard_impl = _move, _cast
    # Where the package is installed, its context asks for a GPU.
    transformer_block.get_fp8_context = lambda *args, **kwargs: nullcontext()
    buffers: Any = param_and_grad_buffer
    buffers._coalescing_manager = _one_by_one
    patched.te_post_all_gather_processing = lambda parameters: None

    def built(*args: Any, **kwargs: Any) -> LanguageModel:
        chunk = LanguageModel(*args, **kwargs)
        for layer in chunk.decoder.layers if chunk.config.fp8 else ():
            for name, module in layer.named_modules():
                if name.endswith(LINEAR):
                    (_quantize if chunk.config.fp8_param else _cast_in_forward)(module)
        return chunk

    megacpt.model.build.LanguageModel = built  # type: ignore[assignment,misc]


def _quantize(module: torch.nn.Module) -> None:
    weight = module._parameters["weight"]
    assert weight is not None
    parameter = torch.nn.Parameter(Quantized.of(torch.zeros(weight.shape)))
    parameter.__dict__.update(weight.__dict__)
    # As Transformer Engine keeps what it drew.
    parameter._high_precision_init_val = torch.full(weight.shape, 7.0)  # type: ignore[attr-defined]
    parameter.get_high_precision_init_val = lambda: parameter._high_precision_init_val  # type: ignore[attr-defined]
    parameter.clear_high_precision_init_val = lambda: None  # type: ignore[attr-defined]
    module._parameters["weight"] = parameter


def start(config: Config, *, gathers: bool, recipe: str = "tensorwise") -> Job:
    """A job in FP8 on this rank's CPU; with `gathers`, the layers' matrices are FP8 parameters.

    For `mxfp8` megatron-core has another way from main parameters to these, which then have no place in its buffers.
    """
    pretend(recipe)
    plan = make_plan(config, dist.get_world_size(), on_gpu=False)
    keys = {"fp8": "hybrid", "fp8_recipe": recipe, "fp8_param_gather": gathers}
    plan = replace(plan, config=config.model_copy(update={"model": config.model.model_copy(update=keys)}))
    return build_job(plan, setup(plan.layout, config.train.seed, config.runtime.threads))


def quantized_of(job: Job) -> dict[str, torch.Tensor]:
    """The FP8 parameters of this rank, dequantised, by chunk and name."""
    return {
        f"{number}.{name}": parameter.dequantize()
        for number, chunk in enumerate(job.chunks)
        for name, parameter in chunk.named_parameters()
        if isinstance(parameter, Quantized)
    }
