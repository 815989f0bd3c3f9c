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

from megacpt.train.memory import FP32, Setting


def logits_bytes(setting: Setting) -> int:
    """Logits and cross-entropy of one micro-batch.

    `vocab_parallel_cross_entropy` turns an fp32 copy of the logits into the softmax and keeps it; an fp32 model's
    logits are their own copy. Beside it in bf16: the logits while it is made, their gradient when it is used. And per
    token the target's place (int64), whether it is on this rank (bool), and the loss mask (fp32).
    """
    item = setting.dtype.itemsize
    width = setting.vocabulary_rows * (FP32 + (item if item < FP32 else 0))
    return tokens_of(setting) * (width + 8 + 1 + FP32)


def layer_bytes(setting: Setting, *, trains: bool) -> int:
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
    own = 2 * _norm(setting, trains)
    inputs = (1 if shape.use_parallel_residual else 2) * _norm_input(setting)
    activation = (4 if shape.swiglu else 1) * ffn
    per_token = inputs + own + mixed + query + key + query + log_sum_exp + activation
    if trains:
        per_token += 2 * hidden + ffn
    batch = setting.config.train.micro_batch_size
    phases = 4 * data.seq_length * shape.rotary_channels * item * (batch if data.reset_position_ids else 1)
    mask = batch * data.seq_length**2 * item if data.reset_attention_mask and not selective else 0
    return tokens_of(setting) * per_token + phases + mask


def _layers(setting: Setting, stage: int, chunk: int) -> list[int]:
    """What each layer of a chunk saves."""
    numbers = setting.layers(stage, chunk)
    return [layer_bytes(setting, trains=setting.trains(number)) for number in numbers]


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
    data = setting.config.data
    if data.reset_attention_mask and model.recompute_granularity is not None:
        saved += setting.config.train.micro_batch_size * data.seq_length**2
    if setting.is_last(stage, chunk):
        return saved + head_bytes(setting)
    # A stage's output stays with the schedule until its gradient comes back.
    return saved + stream


def recomputed_bytes(setting: Setting, stage: int, chunk: int) -> int:
    """What full recomputation brings back at once beyond what was saved."""
    model, count = setting.config.model, setting.chunk_layers
    if model.recompute_granularity != "full":
        return 0
    units = min(model.recompute_num_layers or 1, count)
    # The last layers of `block` are not computed again, and free what they saved before the first one is.
    again = units if model.recompute_method == "uniform" else int(units == count)
    layers = _layers(setting, stage, chunk)
    # The input of a unit is there already.
    return max(0, again * max(layers) - stream_bytes(setting))


def head_bytes(setting: Setting) -> int:
    """The final norm and the input of the output layer."""
    norm = _norm_input(setting) + _norm(setting, True)
    return stream_bytes(setting) + tokens_of(setting) * norm


def stream_bytes(setting: Setting) -> int:
    """The residual stream of a micro-batch, as one rank holds it."""
    return tokens_of(setting) * setting.architecture.hidden_size * setting.dtype.itemsize // _sequence_shards(setting)


def _norm_input(setting: Setting) -> int:
    """Bytes per token of a norm's input; a composed RMSNorm saves it in fp32."""
    item = setting.dtype.itemsize if setting.on_gpu or setting.architecture.normalization == "LayerNorm" else FP32
    return setting.architecture.hidden_size * item // _sequence_shards(setting)


def _norm(setting: Setting, trains: bool) -> int:
    """Bytes per token that a norm saves beside its input."""
    shape = setting.architecture
    if shape.normalization == "LayerNorm":
        return 2 * FP32 // _sequence_shards(setting)
    normalised = 0 if setting.on_gpu or not trains else shape.hidden_size * setting.dtype.itemsize
    return (normalised + FP32) // _sequence_shards(setting)


def tokens_of(setting: Setting) -> int:
    return setting.config.train.micro_batch_size * setting.config.data.seq_length


def _sequence_shards(setting: Setting) -> int:
    return setting.layout.tensor if setting.config.model.sequence_parallel else 1


def full_stream_bytes(setting: Setting) -> int:
    """The residual stream of a micro-batch, all of its positions."""
    return tokens_of(setting) * setting.architecture.hidden_size * setting.dtype.itemsize


def mlp_bytes(setting: Setting) -> int:
    """The MLP's hidden layer of a micro-batch, once."""
    return tokens_of(setting) * setting.architecture.ffn_hidden_size * setting.dtype.itemsize // setting.layout.tensor
