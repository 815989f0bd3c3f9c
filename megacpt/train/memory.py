"""Memory of a rank, from arithmetic alone: parameters, gradients, optimizer state; nothing is built.

Weights, gradients and optimizer state follow megatron-core 0.19's own rules (sources beside each function) and are
exact; activations are in `megacpt.train.peak`. All sizes are bytes. The ranks of a tensor-parallel
group are alike, and so are those of a data-parallel group but for the padding at the end of a distributed optimizer's
buffers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megacpt.config.architecture import Architecture
from megacpt.config.check_engine import attends_with_torch
from megacpt.config.tree import Config
from megacpt.runtime.setup import Layout

FP32 = 4
MOMENTS = 2
MOMENT_ITEM = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
OFFLOADED_ITEM = 4 * FP32
"""Host memory of a parameter whose state is offloaded: itself, its gradient, two moments."""
PARAMETER_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128


@dataclass(frozen=True)
class Setting:
    """What memory depends on.

    Attributes:
        on_gpu: which of our kernels are in the layers, and that they copy nothing; on a CPU their references do.
        engine: Transformer Engine's layers in place of the local ones.
    """

    config: Config
    architecture: Architecture
    layout: Layout
    dtype: torch.dtype
    on_gpu: bool = False
    engine: bool = False

    @property
    def own_swiglu(self) -> bool:
        """Whether our SwiGLU is in the layers."""
        return self.architecture.swiglu and self.config.model.own_swiglu(on_gpu=self.on_gpu or self.engine)

    @property
    def own_rope(self) -> bool:
        """Whether our RoPE is in the layers."""
        return self.config.model.own_rope(on_gpu=self.on_gpu or self.engine)

    @property
    def attends_with_torch(self) -> bool:
        """Whether attention is torch's."""
        return attends_with_torch(self.architecture, self.config.model, engine=self.engine)

    @property
    def replicas(self) -> int:
        """Data- and context-parallel ranks that hold the same weights, over which the optimizer is distributed."""
        return self.layout.data * self.layout.context

    @property
    def chunks(self) -> int:
        """Model chunks per pipeline rank."""
        return self.layout.virtual or 1

    @property
    def chunk_layers(self) -> int:
        """Transformer layers of a chunk."""
        return self.architecture.num_layers // (self.layout.pipeline * self.chunks)

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the embedding on a rank, padding included."""
        divisible_by = self.config.model.make_vocab_size_divisible_by
        return self.architecture.padded_vocab_size(divisible_by, self.layout.tensor) // self.layout.tensor

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a rank in a global batch."""
        return self.config.train.global_batch_size // (self.config.train.micro_batch_size * self.layout.data)

    def is_first(self, stage: int, chunk: int) -> bool:
        """Whether the chunk embeds tokens."""
        return stage == chunk == 0

    def is_last(self, stage: int, chunk: int) -> bool:
        """Whether the chunk computes the loss."""
        return stage == self.layout.pipeline - 1 and chunk == self.chunks - 1

    def trains(self, layer: int) -> bool:
        """Whether layer 0, 1, ... of the whole model is not frozen."""
        freeze = self.config.train.freeze
        return freeze.bottom <= layer < self.architecture.num_layers - freeze.top

    def layers(self, stage: int, chunk: int) -> range:
        """The chunk's layers; chunks are dealt to stages in turn (Narayanan et al. 2021, arXiv 2104.04473, 2.2)."""
        first = (chunk * self.layout.pipeline + stage) * self.chunk_layers
        return range(first, first + self.chunk_layers)


@dataclass(frozen=True)
class Parameter:
    """One parameter tensor of a rank. `shared`: the tied embedding where two stages hold it; `fp8`: kept in FP8."""

    numel: int
    trains: bool = True
    shared: bool = False
    fp8: bool = False


@dataclass(frozen=True)
class State:
    """What a rank of one pipeline stage holds all the time: elements and bytes.

    Attributes:
        weights: with FP8 also the copies that its matmuls read, or FP8 parameters and their transposes.
        optimizer: fp32 main parameters (bf16 only) and moments.
        host: of main parameters, moments and their gradients what is offloaded to host memory; not in `total`.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.weights + self.gradients + self.optimizer


def chunk_parameters(setting: Setting, stage: int, chunk: int) -> list[Parameter]:
    """The tensors of one chunk on one tensor-parallel rank, in the order of `named_parameters()`.

    Column-parallel matrices (qkv, fc1) and their biases are cut by rows, row-parallel matrices (proj, fc2) by columns;
    the biases of the latter and norms are whole on every rank. Rows of the fused qkv are divided evenly even where TP
    exceeds the query groups: megatron-core then gathers activations, not weights
    (`SelfAttention.get_query_key_value_tensors`). Tied embeddings lie on the first and the last stage
    (`LanguageModule.setup_embeddings_and_output_layer`).
    """
    shape, hidden = setting.architecture, setting.architecture.hidden_size
    tied = not shape.untie_embeddings_and_output_weights
    first, last = setting.is_first(stage, chunk), setting.is_last(stage, chunk)
    table = Parameter(setting.vocabulary_rows * hidden, shared=tied and setting.layout.pipeline > 1)
    norm, layer = _norm(shape), _layer(shape, setting.layout.tensor, engine=setting.engine)
    found = [table] if first else []
    found += [
        Parameter(n, setting.trains(number), fp8=is_matrix and keeps_fp8(setting, number))
        for number in setting.layers(stage, chunk)
        for n, is_matrix in layer
    ]
    if last:
        found += [Parameter(n) for n, _ in norm]
    if last and not (first and tied):
        found.append(table)
    return found


Tensors = list[tuple[int, bool]]
"""Elements of each, and whether it is a matrix of a linear layer."""


def _norm(shape: Architecture) -> Tensors:
    return [(shape.hidden_size, False)] * (shape.norm_parameters // shape.hidden_size)


def _layer(shape: Architecture, tp: int, *, engine: bool = False) -> Tensors:
    """A layer's tensors on one tensor-parallel rank."""
    hidden, qkv, fc1 = shape.hidden_size, shape.qkv_size // tp, shape.fc1_size // tp
    projection = _linear(shape.kv_channels * shape.num_attention_heads // tp * hidden, hidden, shape)
    # Transformer Engine's norm is a part of the linear layer that follows it, which is built after the projection.
    first = [*projection, *_norm(shape)] if engine else [*_norm(shape), *projection]
    return [
        *first,
        *_linear(qkv * hidden, qkv, shape),
        *_norm(shape),
        *_linear(fc1 * hidden, fc1, shape),
        *_linear(shape.ffn_hidden_size // tp * hidden, hidden, shape),
    ]


def _linear(matrix: int, bias: int, shape: Architecture) -> Tensors:
    return [(matrix, True), (bias, False)] if shape.add_bias_linear else [(matrix, True)]


def stage_state(setting: Setting, stage: int) -> State:
    """Weights, gradients and optimizer state of a rank of `stage`.

    - Weights: the model's dtype. The distributed optimizer moves trained ones into padded buffers, to gather them; FP8
      ones into buffers of their own, but for mxfp8's, which are gathered through the gradient buffer.
    - Gradients: megatron-core's DDP keeps one buffer per chunk for the whole step, fp32 or the model's dtype.
    - Optimizer: AdamW's two fp32 moments, and in bf16 an fp32 copy of the parameter; a 1/DP share of the buffers under
      the distributed optimizer (Rajbhandari et al. 2020, arXiv 1910.02054, stage 1). Of its ranks, those whose share
      ends in padding hold a little less.

    - Precision-aware: moments as configured; nothing for the part that is offloaded, which takes an fp32 parameter,
      its gradient and two moments of host memory.

    Frozen layers have weights only.
    """
    item = setting.dtype.itemsize
    optimizer = setting.config.optimizer
    gradient_item = FP32 if setting.config.precision.grad_reduce_in_fp32 else item
    chunks = [chunk_parameters(setting, stage, chunk) for chunk in range(setting.chunks)]
    everything = sum(p.numel for chunk in chunks for p in chunk)
    frozen = sum(p.numel for chunk in chunks for p in chunk if not p.trains)
    plain = sum(sum(buckets(setting, stage, [p for p in chunk if p.trains and not p.fp8])) for chunk in chunks)
    fp8 = sum(sum(buckets(setting, stage, [p for p in chunk if p.fp8])) for chunk in chunks)
    buffers = plain + fp8
    shares = setting.replicas if optimizer.use_distributed_optimizer else 1
    offloaded = optimizer.optimizer_offload_fraction if optimizer.optimizer_cpu_offload else 0.0
    return State(
        parameters=everything,
        weights=(frozen + plain) * item + _fp8_bytes(setting, stage, fp8),
        gradients=buffers * gradient_item,
        optimizer=round(buffers * state_item(setting) * (1 - offloaded)) // shares,
        host=round(buffers * OFFLOADED_ITEM * offloaded) // shares,
    )


def state_item(setting: Setting) -> int:
    """Bytes of optimizer state for a parameter."""
    optimizer = setting.config.optimizer
    moments = MOMENT_ITEM[optimizer.exp_avg_dtype] + MOMENT_ITEM[optimizer.exp_avg_sq_dtype]
    return moments + (FP32 if setting.dtype is torch.bfloat16 else 0)


def is_fp8(setting: Setting, number: int) -> bool:
    """Whether the matmuls of layer `number` (0, 1, ... of the whole model) are in FP8."""
    model, layers = setting.config.model, setting.architecture.num_layers
    if model.fp8 is None:
        return False
    if not model.first_last_layers_bf16:
        return True
    return model.num_layers_at_start_in_bf16 <= number < layers - model.num_layers_at_end_in_bf16


def keeps_fp8(setting: Setting, number: int) -> bool:
    """Whether the matrices of layer `number` are parameters in FP8, and not in FP8 for its matmuls only."""
    return setting.config.model.fp8_param_gather and is_fp8(setting, number)


def _fp8_bytes(setting: Setting, stage: int, buffers: int) -> int:
    """A matrix and its transpose, kept between micro-batches (Hopper's FP8 matmul knows one layout of operands).

    Args:
        buffers: elements of the padded buffers where the matrices are parameters in FP8.
    """
    model = setting.config.model
    layers = sum(is_fp8(setting, n) for chunk in range(setting.chunks) for n in setting.layers(stage, chunk))
    matrices = layers * setting.architecture.layer_matmul_parameters // setting.layout.tensor
    return matrices + (buffers if model.fp8_param_gather and model.fp8_recipe != "mxfp8" else matrices)


def gathered_bytes(setting: Setting, stage: int, *, fp8: bool) -> int:
    """Bytes of parameters that a rank of `stage` has from others after each step (distributed optimizer).

    Args:
        fp8: as they are kept with `fp8_param_gather`; mxfp8's go in bf16 all the same.
    """
    ranks = setting.replicas
    chunks = [chunk_parameters(setting, stage, chunk) for chunk in range(setting.chunks)]
    small = fp8 and setting.config.model.fp8_recipe != "mxfp8"
    whole = sum(p.numel * (1 if p.fp8 and small else setting.dtype.itemsize) for chunk in chunks for p in chunk)
    return whole * (ranks - 1) // ranks


def buckets(setting: Setting, stage: int, parameters: list[Parameter]) -> Iterator[int]:
    """Elements of each bucket of one chunk's gradient buffer, padding included.

    As `DistributedOptimizer._compute_per_buffer_param_layout`: from the last parameter to the first, each begins at a
    multiple of 64 elements, a bucket ends at a multiple of lcm(DP, 128), a shared embedding has a bucket of its own,
    and with overlap_grad_reduce the first stage closes a bucket at max(40M, 1M x DP) elements. Without the distributed
    optimizer nothing is padded.
    """
    if not setting.config.optimizer.use_distributed_optimizer:
        yield sum(p.numel for p in parameters)
        return
    dp = setting.replicas
    limited = setting.config.optimizer.overlap_grad_reduce and stage == 0
    limit = max(40_000_000, 1_000_000 * dp) if limited else math.inf
    unit = math.lcm(dp, BUCKET_ALIGNMENT)
    size = 0
    for parameter in reversed(parameters):
        size = round_up(size, PARAMETER_ALIGNMENT)
        if parameter.shared and size:
            yield round_up(size, unit)
            size = 0
        size += parameter.numel
        if size >= limit or parameter.shared:
            yield round_up(size, unit)
            size = 0
    yield round_up(size, unit)


def base_weights_bytes(setting: Setting) -> int:
    """Host memory for the transformer layers' weights of iteration 0, as `megacpt.train.shares` deals them, at most.

    The first rank of a tensor-parallel group has the norms; ranks that hold the same tensor keep a part of it each.
    """
    tensors = _layer(setting.architecture, setting.layout.tensor) * setting.chunk_layers * setting.chunks
    return sum(-(-count // setting.replicas) for count, _ in tensors) * setting.dtype.itemsize


def round_up(value: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-value // unit) * unit


def checkpoint_bytes(setting: Setting) -> int:
    """Tensors of a checkpoint: each weight once over all ranks, vocabulary padding included, and trained ones' state.

    The state is two moments, and in bf16 the fp32 main parameter.
    """
    shape, tp = setting.architecture, setting.layout.tensor
    frozen = setting.config.train.freeze.top + setting.config.train.freeze.bottom
    tables = 2 if shape.untie_embeddings_and_output_weights else 1
    table = setting.vocabulary_rows * tp * shape.hidden_size
    weights = tables * table + shape.num_layers * shape.layer_parameters + shape.norm_parameters
    state_item = FP32 * (MOMENTS + (setting.dtype is torch.bfloat16))
    return weights * setting.dtype.itemsize + (weights - frozen * shape.layer_parameters) * state_item
