"""Fresh weights that do not depend on the layout: every tensor is drawn whole from a seed of its own, then cut.

A pipeline stage of megatron-core draws weights in its own order, so that PP=1 and PP=2 start differently from one seed.
Here the seed of a tensor is (run seed, checkpoint key, layer), and a rank keeps the part that its shard covers.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megacpt.config.architecture import Architecture
from megacpt.model.full_precision import Originals, fill_parameters, places_of

RESIDUAL_OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


def draw_weights(
    chunks: Sequence[torch.nn.Module],
    architecture: Architecture,
    seed: int,
    std: float,
    originals: Originals | None = None,
) -> None:
    """Fill every parameter in place: normal(0, std), residual outputs normal(0, std / sqrt(2 L)), norms 1, biases 0.

    Rows of vocabulary padding are 0 as well. `originals` gets the fp32 values that parameters cannot hold.

    The scaling by depth is GPT-2's, as in Megatron.
    """

    def draw(shard: ShardedTensor) -> None:
        _draw_shard(shard, architecture, seed, std)

    fill_parameters(places_of(chunks), draw, torch.float32, originals)


@torch.no_grad()
def _draw_shard(shard: ShardedTensor, architecture: Architecture, seed: int, std: float) -> None:
    if shard.key.endswith("bias"):
        shard.data.zero_()
        return
    if "norm" in shard.key:
        shard.data.fill_(1.0)
        return
    axes = shard.prepend_axis_num
    whole, offset = shard.global_shape[axes:], shard.global_offset[axes:]
    is_vocabulary = "word_embeddings" in shard.key or "output_layer" in shard.key
    if is_vocabulary:
        whole = (architecture.vocab_size, *whole[1:])
    if shard.key.endswith(RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * architecture.num_layers)
    identity = f"{seed}/{shard.key}/{shard.global_offset[:axes]}"
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "little") >> 1
    )
    values = torch.empty(whole, device="cpu").normal_(0.0, std, generator=generator)
    part = values[tuple(slice(o, o + n) for o, n in zip(offset, shard.data.shape, strict=True))]
    shard.data.zero_()
    shard.data[tuple(slice(0, n) for n in part.shape)] = part.to(shard.data)
