"""The most memory that a rank's step holds at once: what waits for its backward, and what a moment needs beside it.

Three moments can be that peak, and each is worked out (local layer, per micro-batch; a name such as F is what stands
beside it in `megacpt.train.activations`, dW the gradient of a weight before it is added to the gradient buffer):

- *Loss.* The schedule is full on the last stage and the loss goes backward: dW of the output layer and the gradient of
  its input beside the logits' gradient, which ours writes over the logits; megatron-core's copies it where vocabulary
  padding is masked. The loss of hidden states has made its gradients in forward, beside a chunk of logits.
- *Layer.* The first layer of a backward pass: the incoming gradient, and the largest of
  fc2: [gathered gradient] + F + dW;  activation: what it reads and makes;  fc1: its gradients, less what is freed;
  torch's attention of context-parallel ranks: gradients of all keys and values, less what the MLP has freed.
  With full recomputation the unit that is computed again is there too.
- *Embedding.* The first stage ends a backward pass: one micro-batch's activations are free, dW of the table is there;
  on a CPU a bf16 one also in fp32, as torch adds it to the gradient buffer.

The optimizer's own temporaries are smaller unless a micro-batch is tiny, and are a fourth candidate: with bf16
gradients there is an fp32 copy of all of them.
"""

from dataclasses import dataclass

from megacpt.train.activations import (
    chunk_bytes,
    engine_loss,
    full_stream_bytes,
    head_bytes,
    logits_bytes,
    mlp_bytes,
    recomputed_bytes,
    stream_bytes,
)
from megacpt.train.layer_memory import (
    activation_inputs,
    attention_output,
    causal_masks,
    gathered_keys_bytes,
    gathers_keys,
    layer_bytes,
    recomputed_modules,
    sequence_shards,
    tokens_of,
)
from megacpt.train.memory import FP32, Setting, stage_state
from megacpt_kernels.linear_cross_entropy import HeadOptions
from megacpt_kernels.vocabulary import SLICE_BYTES

GATHER_BUFFER = 1
"""Full sequences that megatron-core's linear layers keep between calls under sequence parallelism."""

GRADIENT_COPIES = 2
"""Of the gradients of gathered keys and values: as attention gives them, and in the order of ranks."""


@dataclass(frozen=True)
class Peak:
    """Bytes on a rank of one pipeline stage, beside weights, gradients and optimizer state.

    Attributes:
        in_flight: most chunk forwards (without virtual stages: micro-batches) that wait for their backward at once.
        saved: kept for the backward of those, and the largest unit computed again.
        logits: logits and loss of one micro-batch, on the last stage.
        temporary: what the largest moment needs beside these two.
    """

    in_flight: int
    saved: int
    logits: int
    temporary: int

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.saved + self.logits + self.temporary


def stage_peak(setting: Setting, stage: int) -> Peak:
    """Peak of a step on a rank of `stage`."""
    costs = [chunk_bytes(setting, stage, chunk) for chunk in range(setting.chunks)]
    first = costs[0]
    again = max(recomputed_bytes(setting, stage, chunk) for chunk in range(setting.chunks))
    last = setting.is_last(stage, setting.chunks - 1)
    logits = logits_bytes(setting) if last else 0
    costs[-1] += logits
    held = peak(setting, stage, costs) - logits
    # The loss and the final norm have gone backward, and their memory is free, before a layer is computed again.
    head = head_bytes(setting) if last else 0
    saved = held + max(0, again - logits - head)
    moments = [held + logits + _loss(setting)] if last else []
    moments.append(held - head + again + max(_layer(setting, stage), _attention(setting, stage)))
    if stage == 0:
        moments.append(held - first + stream_bytes(setting) + _largest_table(setting))
    moments.append(_optimizer(setting, stage))
    moment = max(moments) + _between(setting, stage)
    return Peak(peak(setting, stage, [1] * setting.chunks), saved, logits, max(0, moment - saved - logits))


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


def _loss(setting: Setting) -> int:
    """Beside logits and softmax while the loss goes backward."""
    shape, item = setting.architecture, setting.dtype.itemsize
    own = setting.config.model.own_loss
    if own is not None:
        return _own_loss(setting, own)
    gradient = tokens_of(setting) * setting.vocabulary_rows * item
    padded = setting.vocabulary_rows * setting.layout.tensor > shape.vocab_size
    # In bf16 the fp32 softmax is free when the gradient is copied. Transformer Engine's loss copies what it reads.
    copy = gradient if (padded and item == FP32) or engine_loss(setting) else 0
    weight = setting.vocabulary_rows * shape.hidden_size * item
    return max(copy, gradient + weight + full_stream_bytes(setting) - logits_bytes(setting))


def _own_loss(setting: Setting, own: str) -> int:
    """Beside logits, or a chunk of them, that turn into their gradient."""
    item, hidden, tokens = setting.dtype.itemsize, setting.architecture.hidden_size, tokens_of(setting)
    table, stream = setting.vocabulary_rows * hidden, full_stream_bytes(setting)
    # A reference's copies; a GPU's kernels make none.
    copies = 0 if setting.on_gpu else min(SLICE_BYTES, tokens * setting.vocabulary_rows * FP32)
    if own == "megacpt":
        # fp32 logits turn into probabilities, and those into the gradient, where they lie.
        return max(copies if item < FP32 else 0, table * item + stream)
    chunk = min(HeadOptions().chunk_bytes, tokens * setting.vocabulary_rows * item)
    if item < FP32 and not setting.on_gpu:
        copies = max(copies, chunk // item * FP32 + tokens * hidden * FP32)
    # Forward has hidden states beside their gradient; backward rounds the weight's to its dtype.
    states = stream + (stream_bytes(setting) if sequence_shards(setting) > 1 else 0)
    return max(states + chunk + copies, table * item if item < FP32 else 0)


def _layer(setting: Setting, stage: int) -> int:
    """The largest excess of a layer's backward over what it saved."""
    shape, item, tp = setting.architecture, setting.dtype.itemsize, setting.layout.tensor
    trains = _trains(setting, stage)
    fused = setting.config.model.gradient_accumulation_fusion
    weight = shape.hidden_size * shape.ffn_hidden_size // tp * item if trains and not fused else 0
    wide, full = mlp_bytes(setting), full_stream_bytes(setting)
    freed = wide if trains else 0
    widths = 2 if shape.swiglu else 1
    fc2 = wide + weight
    # The reference of ours computes silu(gate) again; in bf16 all that it reads and makes is there in fp32, too.
    again = wide * (1 if item == FP32 else 10) if setting.own_swiglu and not setting.on_gpu else 0
    activation = (1 + widths) * wide + again - freed
    fc1 = widths * wide + full + widths * weight - freed - activation_inputs(setting) * wide
    return stream_bytes(setting) + max(fc2, activation, fc1)


def _attention(setting: Setting, stage: int) -> int:
    """Beside what a layer saved while gradients of gathered keys and values are summed; its MLP has gone backward."""
    if not gathers_keys(setting):
        return 0
    layer = layer_bytes(setting, setting.layers(stage, setting.chunks - 1)[-1])
    freed = layer.fc1_input + (0 if "mlp" in recomputed_modules(setting) else layer.mlp)
    gathered, again = gathered_keys_bytes(setting), 0
    if "core_attn" in recomputed_modules(setting):
        again = gathered + 2 * attention_output(setting)
    return stream_bytes(setting) + GRADIENT_COPIES * gathered + again - freed


def _largest_table(setting: Setting) -> int:
    """The embedding's gradient, and what torch widens on a CPU to add it to one of another dtype."""
    item = setting.dtype.itemsize
    widened = FP32 if item < FP32 and setting.config.precision.grad_reduce_in_fp32 and not setting.on_gpu else 0
    return setting.vocabulary_rows * setting.architecture.hidden_size * (item + widened)


def _optimizer(setting: Setting, stage: int) -> int:
    """What an update makes for itself; Transformer Engine's AdamW reads gradients as they are."""
    if setting.config.optimizer.use_precision_aware_optimizer:
        return 0
    copies = 0
    if setting.dtype.itemsize < FP32 and not setting.config.precision.grad_reduce_in_fp32:
        copies = stage_state(setting, stage).gradients // setting.dtype.itemsize * FP32
    share = setting.replicas if setting.config.optimizer.use_distributed_optimizer else 1
    return copies // share


def _between(setting: Setting, stage: int) -> int:
    """What is there between micro-batches: tensors sent to a neighbour, sequences gathered over TP, masks."""
    sent = 0
    if setting.layout.virtual is not None:
        sent = (2 if stage == 0 else 4) * stream_bytes(setting)
    elif stage > 0 and setting.micro_batches > warm_up(setting, stage) + 1:
        sent = stream_bytes(setting)
    gathered = full_stream_bytes(setting) * GATHER_BUFFER if setting.config.model.sequence_parallel else 0
    return sent + gathered + causal_masks(setting) + _stand_ins(setting, stage)


def _stand_ins(setting: Setting, stage: int) -> int:
    """What autograd is given for gradients that a GPU's matmuls have added to the buffer already.

    Transformer Engine keeps one tensor for each shape of weight (`transformer_engine.pytorch.module.base`).
    """
    fused = setting.on_gpu and setting.config.model.gradient_accumulation_fusion
    if not fused or not _trains(setting, stage):
        return 0
    shape, tp = setting.architecture, setting.layout.tensor
    hidden, heads = shape.hidden_size, shape.kv_channels * shape.num_attention_heads
    shapes = {
        (shape.qkv_size // tp, hidden),
        (hidden, heads // tp),
        (shape.fc1_size // tp, hidden),
        (hidden, shape.ffn_hidden_size // tp),
    }
    return sum(rows * columns for rows, columns in shapes) * setting.dtype.itemsize


def _trains(setting: Setting, stage: int) -> bool:
    """Whether a layer on this stage is not frozen."""
    return any(setting.trains(n) for chunk in range(setting.chunks) for n in setting.layers(stage, chunk))
