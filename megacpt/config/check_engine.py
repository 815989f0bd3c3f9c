"""Checks of the keys that need Transformer Engine, a GPU, or one another: overlap, context parallelism, state.

Pure: whether the package and the card are there is asked in `megacpt.runtime.engine`.
"""

from collections.abc import Iterator

from megacpt.config.architecture import Architecture
from megacpt.config.check_fp8 import check_fp8
from megacpt.config.tree import Config, Model
from megacpt.errors import UserError

HEAD_ALIGNMENT = 8
"""Head dimensions of fused attention are multiples of this."""


def check_engine(config: Config, architecture: Architecture, *, engine: bool, on_gpu: bool, bf16: bool) -> None:
    """Refuse combinations that cannot run, before anything is built.

    Args:
        engine: Transformer Engine's classes fill the layer's slots.
        on_gpu: the run is one on GPUs.
        bf16: the model's dtype.

    Raises:
        UserError: one sentence that names the keys.
    """
    problems = (
        *_needs_engine(config, engine),
        *_needs_gpu(config, on_gpu, engine),
        *_layers(config, architecture, engine),
        *_cuda_graphs(config),
        *_kernels(config, architecture),
        *_loss(config, bf16),
        *check_fp8(config, architecture, bf16),
        *_context_parallel(config, architecture, engine),
        *_overlap(config),
        *_optimizer(config, bf16),
    )
    if problems:
        raise UserError(problems[0])


def _needs_engine(config: Config, engine: bool) -> Iterator[str]:
    """Keys that only Transformer Engine's layers know."""
    if engine:
        return
    model = config.model
    asked = {
        f"fp8 {model.fp8}": model.fp8 is not None,
        "tp_comm_overlap": model.tp_comm_overlap,
        f"attention_backend {model.attention_backend}": model.attention_backend != "auto",
        "cross_entropy_fusion_impl te": model.cross_entropy_loss_fusion and model.cross_entropy_fusion_impl == "te",
    }
    for name, given in asked.items():
        if given:
            yield (
                f"model.{name} needs Transformer Engine's layers, and this run has the local ones; set "
                f"model.transformer_impl to transformer_engine, or leave {name.split()[0]} out"
            )


def _needs_gpu(config: Config, on_gpu: bool, engine: bool) -> Iterator[str]:
    if on_gpu:
        return
    model, optimizer = config.model, config.optimizer
    asked = {
        "model.transformer_impl transformer_engine": engine,
        f"model.cuda_graph_impl {model.cuda_graph_impl}": model.cuda_graph_impl != "none",
        "model.gradient_accumulation_fusion": model.gradient_accumulation_fusion,
        "optimizer.use_precision_aware_optimizer": optimizer.use_precision_aware_optimizer,
        "optimizer.optimizer_cpu_offload": optimizer.optimizer_cpu_offload,
    }
    for name, given in asked.items():
        if given:
            yield f"{name} needs a GPU, and this run is one on a CPU; leave it out, or plan with --dry-run --device gpu"


def has_fused_attention(architecture: Architecture) -> bool:
    """Whether Transformer Engine has fused attention (flash-attn, cuDNN) for a model's head dimension."""
    return architecture.kv_channels % HEAD_ALIGNMENT == 0


def attends_with_torch(architecture: Architecture, model: Model, *, engine: bool) -> bool:
    """Whether attention is torch's, and not Transformer Engine's.

    In Transformer Engine's layers it is where only the one that writes out scores takes the heads; torch's pads them.
    """
    return not engine or (model.attention_backend == "auto" and not has_fused_attention(architecture))


def _layers(config: Config, architecture: Architecture, engine: bool) -> Iterator[str]:
    model = config.model
    if engine and architecture.use_parallel_residual:
        yield (
            "model.transformer_impl transformer_engine has no parallel residual (its norms are inside the linear "
            "layers); set it to local for this model"
        )
    torch_only = engine and not has_fused_attention(architecture)
    if torch_only and model.attention_backend in ("flash", "fused"):
        yield (
            f"model.attention_backend {model.attention_backend} takes head dimensions that are multiples of "
            f"{HEAD_ALIGNMENT}, and this model's is {architecture.kv_channels}; leave it at auto, which is torch's "
            "attention then"
        )
    if torch_only and config.data.reset_attention_mask:
        yield (
            "data.reset_attention_mask with Transformer Engine's layers needs its fused attention, whose head "
            f"dimensions are multiples of {HEAD_ALIGNMENT}, and this model's is {architecture.kv_channels}; leave it "
            "out, or set model.transformer_impl to local"
        )


def _cuda_graphs(config: Config) -> Iterator[str]:
    model = config.model
    if model.cuda_graph_impl == "none":
        return
    if model.recompute_granularity == "full":
        yield "model.cuda_graph_impl local cannot capture full recomputation; set recompute_granularity to selective"
    if config.data.reset_attention_mask:
        yield (
            "model.cuda_graph_impl local replays fixed shapes, and data.reset_attention_mask packs documents of any "
            "length; set one of them only"
        )
    if config.eval.tasks:
        yield (
            "model.cuda_graph_impl local replays fixed shapes, and eval.tasks scores texts of any length; set one of "
            "them only, or run tools/evaluate.py on the checkpoints"
        )
    if model.fp8 is not None and "mlp" in (model.recompute_modules or ()):
        yield (
            "model.cuda_graph_impl local cannot capture the MLP of recompute_modules in FP8, which Transformer Engine "
            "recomputes; leave mlp or one of them out"
        )


def _kernels(config: Config, architecture: Architecture) -> Iterator[str]:
    if config.model.swiglu_fusion_impl == "megacpt" and not architecture.swiglu:
        yield "model.swiglu_fusion_impl megacpt fuses the gate of an MLP that has one; leave it out for this model"


def _loss(config: Config, bf16: bool) -> Iterator[str]:
    model = config.model
    if model.cross_entropy_fusion_impl == "te" and not model.cross_entropy_loss_fusion:
        yield "model.cross_entropy_fusion_impl te does nothing without cross_entropy_loss_fusion; set both or neither"
    if model.cross_entropy_loss_fusion and model.cross_entropy_fusion_impl in ("native", "te") and not bf16:
        yield (
            f"model.cross_entropy_fusion_impl {model.cross_entropy_fusion_impl} rounds the gradient of the logits to "
            "bf16, and this model is in fp32; leave it out"
        )


def _context_parallel(config: Config, architecture: Architecture, engine: bool) -> Iterator[str]:
    model, data = config.model, config.data
    cp, tp = model.context_parallel_size, model.tensor_model_parallel_size
    if cp == 1:
        if model.cp_comm_type is not None:
            yield "model.cp_comm_type does nothing at model.context_parallel_size 1; raise that or drop it"
        return
    if data.seq_length % (2 * cp * (tp if model.sequence_parallel else 1)):
        yield (
            f"model.context_parallel_size {cp} cuts a sequence into {2 * cp} chunks (x TP with sequence_parallel), but "
            f"data.seq_length {data.seq_length} is not divisible; choose a multiple"
        )
    if attends_with_torch(architecture, model, engine=engine):
        if model.cp_comm_type in ("p2p", "a2a"):
            yield (
                f"model.cp_comm_type {model.cp_comm_type} is Transformer Engine's fused attention's, and this run "
                "attends with torch's, which gathers keys and values; choose all_gather, or leave it out"
            )
    elif model.attention_backend == "unfused":
        yield (
            "model.attention_backend unfused knows nothing of model.context_parallel_size > 1; choose auto, flash or "
            "fused"
        )
    if data.reset_attention_mask and engine:
        yield (
            "data.reset_attention_mask does not go with model.context_parallel_size > 1 in Transformer Engine's "
            "layers: documents would have to be padded to multiples of 2 x CP; set model.transformer_impl to local, or "
            "unset one of them"
        )
    groups = architecture.num_query_groups // tp
    if model.cp_comm_type == "a2a" and (groups == 0 or groups % cp):
        yield (
            f"model.cp_comm_type a2a deals heads to {cp} ranks, but a rank has {groups} of num_query_groups; choose "
            "p2p or all_gather"
        )


def _overlap(config: Config) -> Iterator[str]:
    model, optimizer = config.model, config.optimizer
    if model.tp_comm_overlap and not model.sequence_parallel:
        yield (
            "model.tp_comm_overlap overlaps the gathers and scatters of sequence parallelism; set "
            "model.sequence_parallel (and tensor_model_parallel_size > 1), or leave it out"
        )
    if model.tp_comm_overlap and model.fp8 is not None and model.fp8_recipe == "blockwise":
        yield (
            "model.tp_comm_overlap has no buffers for fp8_recipe blockwise; choose tensorwise or delayed, or leave it "
            "out"
        )
    if model.tp_comm_overlap and config.data.reset_attention_mask and config.train.micro_batch_size > 1:
        yield (
            "model.tp_comm_overlap has buffers of seq_length rows, and data.reset_attention_mask packs a micro-batch "
            "into one row; set train.micro_batch_size to 1 or leave one of them out"
        )
    if optimizer.overlap_cpu_optimizer_d2h_h2d and not optimizer.optimizer_cpu_offload:
        yield "optimizer.overlap_cpu_optimizer_d2h_h2d belongs to optimizer_cpu_offload; set both or neither"


def _optimizer(config: Config, bf16: bool) -> Iterator[str]:
    optimizer = config.optimizer
    small = [name for name in ("exp_avg_dtype", "exp_avg_sq_dtype") if getattr(optimizer, name) != "fp32"]
    if small and not optimizer.use_precision_aware_optimizer:
        yield (
            f"optimizer.{small[0]} {getattr(optimizer, small[0])} needs optimizer.use_precision_aware_optimizer; set "
            "it, or keep fp32"
        )
    if optimizer.optimizer_cpu_offload and not optimizer.use_precision_aware_optimizer:
        yield "optimizer.optimizer_cpu_offload needs optimizer.use_precision_aware_optimizer; set both or neither"
    if optimizer.optimizer_cpu_offload and small:
        yield (
            f"optimizer.{small[0]} {getattr(optimizer, small[0])} does not go with optimizer_cpu_offload: the CPU's "
            "AdamW keeps fp32 moments; choose one of them"
        )
    if not optimizer.optimizer_cpu_offload and optimizer.optimizer_offload_fraction != 1.0:
        yield "optimizer.optimizer_offload_fraction belongs to optimizer.optimizer_cpu_offload; set both or neither"
    if optimizer.use_precision_aware_optimizer and not optimizer.use_distributed_optimizer:
        yield (
            "optimizer.use_precision_aware_optimizer needs optimizer.use_distributed_optimizer (at any number of "
            "ranks); set both or neither"
        )
    if optimizer.use_precision_aware_optimizer and not bf16:
        yield "optimizer.use_precision_aware_optimizer needs precision.dtype bf16; set it or leave the optimizer plain"
