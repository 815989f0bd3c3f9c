"""Activations that a rank keeps for the backward pass: of a chunk of layers, of the head, of the loss."""

from megacpt.train.layer_memory import (
    angles,
    dropped,
    kept,
    layer_bytes,
    norm_input,
    norm_own,
    recomputed_modules,
    sequence_shards,
    tokens_of,
)
from megacpt.train.memory import FP32, Setting


def logits_bytes(setting: Setting) -> int:
    """Logits and cross-entropy of one micro-batch.

    Ours keeps the logits themselves, and per token the target (int64), the normaliser (fp32) and the mask (uint8); in
    fp32 on a CPU, the log-sum-exp of this rank's columns too, where ranks share the vocabulary. That of hidden states
    has made its gradients: the output layer's in fp32, and the hidden states' in the place of these.

    megatron-core's `vocab_parallel_cross_entropy` turns an fp32 copy of the logits into the softmax and keeps it; an
    fp32 model's logits are their own copy. Beside it in bf16: the logits while it is made, their gradient when it is
    used. And per token the target's place (int64), whether it is on this rank (bool), and the mask (bool).

    Transformer Engine's fused loss keeps a copy of the logits, which turns into their gradient, and two statistics per
    token (fp32).
    """
    item = setting.dtype.itemsize
    model = setting.config.model
    if model.own_loss == "linear":
        table = setting.vocabulary_rows * setting.architecture.hidden_size * FP32
        return table + full_stream_bytes(setting) - stream_bytes(setting)
    if model.own_loss == "megacpt":
        own = FP32 if item == FP32 and not setting.on_gpu and setting.layout.tensor > 1 else 0
        return tokens_of(setting) * (setting.vocabulary_rows * item + 8 + FP32 + 1 + own)
    if engine_loss(setting):
        return tokens_of(setting) * (setting.vocabulary_rows * item + 2 * FP32 + 1)
    width = setting.vocabulary_rows * (FP32 + (item if item < FP32 else 0))
    return tokens_of(setting) * (width + 8 + 1 + 1)


def engine_loss(setting: Setting) -> bool:
    """Whether the loss is Transformer Engine's."""
    model = setting.config.model
    return model.cross_entropy_loss_fusion and model.cross_entropy_fusion_impl == "te"


def chunk_bytes(setting: Setting, stage: int, chunk: int) -> int:
    """What one forward of a chunk saves, logits aside."""
    model = setting.config.model
    layers = _layers(setting, stage, chunk)
    stream = stream_bytes(setting)
    units = model.recompute_num_layers or 1
    if model.recompute_granularity != "full":
        saved = sum(layers)
    elif model.recompute_method == "uniform":
        saved = -(-len(layers) // units) * stream
    else:
        saved = min(units, len(layers)) * stream + sum(layers[units:])
    saved += _checkpointed_mask(setting) + (angles(setting) if setting.own_rope or setting.engine else 0)
    if setting.is_last(stage, chunk):
        return saved + head_bytes(setting)
    # A stage's output stays with the schedule until its gradient comes back.
    return saved + stream


def recomputed_bytes(setting: Setting, stage: int, chunk: int) -> int:
    """What recomputation brings back at once beyond what was saved: a unit's layers, or modules of one layer."""
    model, count = setting.config.model, setting.chunk_layers
    if model.recompute_granularity != "full":
        # Attention's core alone comes back while the layer's other part is free already.
        if set(recomputed_modules(setting)) <= {"core_attn"}:
            return 0
        return max(dropped(setting, layer_bytes(setting, number)) for number in setting.layers(stage, chunk))
    units = min(model.recompute_num_layers or 1, count)
    # The last layers of `block` are not computed again, and free what they saved before the first one is.
    again = units if model.recompute_method == "uniform" else int(units == count)
    layers = _layers(setting, stage, chunk)
    # The input of a unit is there already.
    return max(0, again * max(layers) - stream_bytes(setting))


def head_bytes(setting: Setting) -> int:
    """The final norm and the input of the output layer."""
    norm = norm_input(setting) + norm_own(setting)
    return stream_bytes(setting) + tokens_of(setting) * norm


def stream_bytes(setting: Setting) -> int:
    """The residual stream of a micro-batch, as one rank holds it."""
    return full_stream_bytes(setting) // sequence_shards(setting)


def full_stream_bytes(setting: Setting) -> int:
    """The residual stream of a micro-batch, all of its positions."""
    return tokens_of(setting) * setting.architecture.hidden_size * setting.dtype.itemsize


def mlp_bytes(setting: Setting) -> int:
    """The MLP's hidden layer of a micro-batch, once."""
    return tokens_of(setting) * setting.architecture.ffn_hidden_size * setting.dtype.itemsize // setting.layout.tensor


def _layers(setting: Setting, stage: int, chunk: int) -> list[int]:
    """What each layer of a chunk saves."""
    return [kept(setting, layer_bytes(setting, number)) for number in setting.layers(stage, chunk)]


def _checkpointed_mask(setting: Setting) -> int:
    """The boolean mask that follows documents, which recomputation of attention keeps, once for all layers."""
    data, model = setting.config.data, setting.config.model
    if setting.engine or not data.reset_attention_mask or model.recompute_granularity is None:
        return 0
    if model.recompute_granularity == "selective" and "core_attn" not in recomputed_modules(setting):
        return 0
    return setting.config.train.micro_batch_size * data.seq_length**2 // setting.layout.context
