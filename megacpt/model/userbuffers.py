"""Buffers through which Transformer Engine's linear layers overlap tensor-parallel communication with their matmuls."""

from megacpt.config.architecture import Architecture
from megacpt.config.tree import Config


def make_userbuffers(config: Config, architecture: Architecture) -> None:
    """Collective over all ranks, after the process groups are there and before the model is built.

    The buffers hold a whole micro-batch of the residual stream, in FP8 and, where some layers stay in bf16, in bf16.
    """
    from transformer_engine.pytorch.module import base

    model, train = config.model, config.train
    modes = base.UserBufferQuantizationMode
    quantization = [modes.FP8 if model.fp8 is not None else modes.NONE]
    if model.fp8 is not None and model.first_last_layers_bf16:
        quantization.append(modes.NONE)
    rows = train.micro_batch_size * config.data.seq_length // model.context_parallel_size
    base.initialize_ub(
        shape=[rows, architecture.hidden_size],
        tp_size=model.tensor_model_parallel_size,
        quantization_modes=quantization,
        bootstrap_backend="nccl",
    )
