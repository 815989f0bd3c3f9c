"""Activations that a rank keeps for the backward pass: an estimate, from what megacpt's layer saves.

What each part of the local layer spec saves was read off `torch.autograd.graph.saved_tensors_hooks`, and a test holds
the formulas against it. Bytes per token of a micro-batch on one rank, in the manner of Korthikanti et al. 2022 (arXiv
2205.05198, 4.1), with d bytes an element, h hidden, f FFN, H heads and G query groups of D channels, t = TP, and
u = t with sequence parallelism, else 1:

    2 norms               2 (d h + 4) / u          input and fp32 inverse root mean square; LayerNorm: the mean too
    inputs of qkv, fc1    2 d h / u                (not where frozen: needed for weight gradients only)
    fused qkv             d D (H + 2 G) / t        held whole by its view, the values; with t > G of all ranks
    query, key            d D (H + max(G, t)) / t  after RoPE
    attention             d D H / t + 4 H / t      output, which is proj's input too, and fp32 log-sum-exp; no scores
    SwiGLU                4 d f / t                gate and up, silu(gate), up + glu_linear_offset
    input of fc2          d f / t                  (not where frozen)

and for RoPE 4 s d D a layer (cosines and sines of query and key; D counts the channels that rotate). An MLP without a
gate saves GELU's input, d f / t, in place of SwiGLU's 4 d f / t. Under a parallel residual the norms share their input.
Temporary buffers, the allocator's and the communication library's are not counted.
"""

from dataclasses import dataclass

from megacpt.train.memory import FP32, Setting


@dataclass(frozen=True)
class Activations:
    """Peak bytes on a rank of one pipeline stage.

    Attributes:
        in_flight: most chunk forwards (without virtual stages: micro-batches) that wait for their backward at once.
        saved: kept for the backward of those, and the largest unit computed again.
        logits: the loss of one micro-batch, on the last stage; with `saved` it makes the peak.
    """

    in_flight: int
    saved: int
    logits: int


def stage_activations(setting: Setting, stage: int, *, fused_norm: bool = True) -> Activations:
    """Peak activations of `stage`.

    Args:
        fused_norm: RMSNorm in one kernel, as on a GPU. On a CPU it is composed and keeps more: the input in fp32 and,
            for the weight's gradient, the normalised input. LayerNorm is fused everywhere.
    """
    costs = [_chunk(setting, stage, chunk, fused_norm) for chunk in range(setting.chunks)]
    again = max(_recomputed(setting, stage, chunk, fused_norm) for chunk in range(setting.chunks))
    last = setting.is_last(stage, setting.chunks - 1)
    logits = logits_bytes(setting) if last else 0
    costs[-1] += logits
    # The loss and the final norm have gone backward, and their memory is free, before a layer is computed again.
    free = logits + _head(setting, fused_norm) if last else 0
    return Activations(
        in_flight=peak(setting, stage, [1] * setting.chunks),
        saved=peak(setting, stage, costs) - logits + max(0, again - free),
        logits=logits,
    )


def warm_up(setting: Setting, stage: int) -> int:
    """Chunk forwards of a rank before its first backward.

    1F1B runs PP - stage - 1, the interleaved schedule 2 (PP - stage - 1) + (VP - 1) PP
    (`megatron.core.pipeline_parallel.schedules.get_pp_rank_microbatches`), at most all there are.
    """
    pipeline, chunks = setting.layout.pipeline, setting.chunks
    behind = pipeline - stage - 1
    count = behind if setting.layout.virtual is None else 2 * behind + (chunks - 1) * pipeline
    return min(count, setting.micro_batches * chunks)


def peak(setting: Setting, stage: int, costs: list[int]) -> int:
    """The most that is held at once, where a forward of chunk c holds costs[c] until its backward.

    Plays the schedule: chunks go forward in rounds of PP micro-batches each, backward in the same rounds from the last
    chunk on; after the warm-up one forward and one backward alternate.
    """
    pipeline, chunks = setting.layout.pipeline, setting.chunks
    warm, held, most = warm_up(setting, stage), 0, 0
    for k in range(min(setting.micro_batches * chunks, warm + 2 * pipeline * chunks)):
        held += costs[k // pipeline % chunks]
        most = max(most, held)
        if k >= warm:
            held -= costs[chunks - 1 - (k - warm) // pipeline % chunks]
    return most


def logits_bytes(setting: Setting) -> int:
    """Logits and cross-entropy of one micro-batch.

    `vocab_parallel_cross_entropy` turns an fp32 copy of the logits into the softmax and keeps it; an fp32 model's
    logits are their own copy. Beside it in bf16: the logits while it is made, their gradient when it is used. And per
    token the target's place (int64), whether it is on this rank (bool), and the loss mask (fp32).
    """
    item = setting.dtype.itemsize
    width = setting.vocabulary_rows * (FP32 + (item if item < FP32 else 0))
    return _tokens(setting) * (width + 8 + 1 + FP32)


def layer_bytes(setting: Setting, *, trains: bool, fused_norm: bool) -> int:
    """What one layer saves for one micro-batch, after the table at the top of this file.

    Selective recomputation drops what attention alone needs: here the log-sum-exp and a mask that follows documents.
    """
    shape, tp, item = setting.architecture, setting.layout.tensor, setting.dtype.itemsize
    data, selective = setting.config.data, setting.config.model.recompute_granularity == "selective"
    hidden, ffn = shape.hidden_size * item // _sequence_shards(setting), shape.ffn_hidden_size * item // tp
    channels = shape.kv_channels * item
    query, key = channels * shape.num_attention_heads // tp, channels * max(shape.num_query_groups // tp, 1)
    gathered = tp > shape.num_query_groups
    mixed = shape.qkv_size * item // (1 if gathered else tp)
    log_sum_exp = 0 if selective else FP32 * shape.num_attention_heads // tp
    own = 2 * _norm(setting, trains, fused_norm)
    inputs = (1 if shape.use_parallel_residual else 2) * _norm_input(setting, fused_norm)
    activation = (4 if shape.swiglu else 1) * ffn
    per_token = inputs + own + mixed + query + key + query + log_sum_exp + activation
    if trains:
        per_token += 2 * hidden + ffn
    batch = setting.config.train.micro_batch_size
    phases = 4 * data.seq_length * shape.rotary_channels * item * (batch if data.reset_position_ids else 1)
    mask = batch * data.seq_length**2 * item if data.reset_attention_mask and not selective else 0
    return _tokens(setting) * per_token + phases + mask


def _layers(setting: Setting, stage: int, chunk: int, fused_norm: bool) -> list[int]:
    """What each layer of a chunk saves."""
    numbers = setting.layers(stage, chunk)
    return [layer_bytes(setting, trains=setting.trains(number), fused_norm=fused_norm) for number in numbers]


def _chunk(setting: Setting, stage: int, chunk: int, fused_norm: bool) -> int:
    """What one forward of a chunk saves, logits aside."""
    model = setting.config.model
    layers = _layers(setting, stage, chunk, fused_norm)
    stream = _stream(setting)
    units = model.recompute_num_layers or 1
    if model.recompute_granularity != "full":
        saved = sum(layers)
    elif model.recompute_method == "uniform":
        saved = -(-len(layers) // units) * stream
    else:
        saved = min(units, len(layers)) * stream + sum(layers[units:])
    data = setting.config.data
    if data.reset_attention_mask and model.recompute_granularity is not None:
        saved += setting.config.train.micro_batch_size * data.seq_length**2
    if setting.is_last(stage, chunk):
        return saved + _head(setting, fused_norm)
    # A stage's output stays with the schedule until its gradient comes back.
    return saved + stream


def _recomputed(setting: Setting, stage: int, chunk: int, fused_norm: bool) -> int:
    """What full recomputation brings back at once beyond what was saved."""
    model, count = setting.config.model, setting.chunk_layers
    if model.recompute_granularity != "full":
        return 0
    units = min(model.recompute_num_layers or 1, count)
    # The last layers of `block` are not computed again, and free what they saved before the first one is.
    again = units if model.recompute_method == "uniform" else int(units == count)
    layers = _layers(setting, stage, chunk, fused_norm)
    # The input of a unit is there already.
    return max(0, again * max(layers) - _stream(setting))


def _head(setting: Setting, fused_norm: bool) -> int:
    """The final norm and the input of the output layer."""
    norm = _norm_input(setting, fused_norm) + _norm(setting, True, fused_norm)
    return _stream(setting) + _tokens(setting) * norm


def _stream(setting: Setting) -> int:
    """The residual stream of a micro-batch, as one rank holds it."""
    return _tokens(setting) * setting.architecture.hidden_size * setting.dtype.itemsize // _sequence_shards(setting)


def _norm_input(setting: Setting, fused: bool) -> int:
    """Bytes per token of a norm's input; a composed RMSNorm saves it in fp32."""
    item = setting.dtype.itemsize if fused or setting.architecture.normalization == "LayerNorm" else FP32
    return setting.architecture.hidden_size * item // _sequence_shards(setting)


def _norm(setting: Setting, trains: bool, fused: bool) -> int:
    """Bytes per token that a norm saves beside its input."""
    shape = setting.architecture
    if shape.normalization == "LayerNorm":
        return 2 * FP32 // _sequence_shards(setting)
    normalised = 0 if fused or not trains else shape.hidden_size * setting.dtype.itemsize
    return (normalised + FP32) // _sequence_shards(setting)


def _tokens(setting: Setting) -> int:
    return setting.config.train.micro_batch_size * setting.config.data.seq_length


def _sequence_shards(setting: Setting) -> int:
    return setting.layout.tensor if setting.config.model.sequence_parallel else 1
