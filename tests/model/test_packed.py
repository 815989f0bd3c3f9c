"""Documents by their boundaries instead of a mask, and the parts of a sequence that context-parallel ranks see.

Transformer Engine's attention does not run on a CPU. What feeds it does: here a stand-in that attends segment by
segment takes its slot, in the layout [t, h, d] that the real one gets, and the losses have to be those of the mask.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams

from megacpt.config.tree import Config
from megacpt.model import spec
from megacpt.model.build import BuildOptions, build_chunks, transformer_config
from megacpt.model.forward import context_part, packed_documents, run_batches
from megacpt.model.init import draw_weights
from megacpt.model.layers import SDPAttention
from megacpt.model.score import score_micro_batches
from megacpt.runtime.setup import setup
from megacpt.train.planning import make_plan
from tests.jobs import small_config
from tests.ranks import run_ranks

DOCUMENTS = {"reset_attention_mask": True, "reset_position_ids": True}


class SegmentAttention(SDPAttention):
    """Causal attention inside each of the segments that `packed_seq_params` names."""

    def forward(  # type: ignore[override]
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, /, **others: Any
    ) -> torch.Tensor:
        packed: PackedSeqParams = others["packed_seq_params"]
        assert (mask, packed.qkv_format, query.dim()) == (None, "thd", 3)
        edges = packed.cu_seqlens_q.tolist()
        parts = []
        for start, end in pairwise(edges):
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
            part = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
            parts.append(part[0].transpose(0, 1))
        return torch.cat(parts).flatten(1)


def losses(config: Config, packed: bool) -> tuple[Any, Any, float]:
    """Of a step's batches: loss by source, what scoring sees by sample, and a gradient norm, on this rank."""
    plan = make_plan(config, dist.get_world_size(), on_gpu=False)
    setup(plan.layout, 1, threads=1)
    local = spec.slots(plan.architecture, config.model, engine=False)
    if packed:
        stand_in = replace(local, attention=SegmentAttention)
        spec.slots = lambda architecture, model, *, engine: stand_in
    made = transformer_config(plan.architecture, config.model, BuildOptions(plan.dtype, restart_positions=True))
    options = BuildOptions(plan.dtype, restart_positions=True, engine=packed)
    chunks = build_chunks(plan.architecture, config.model, made, options)
    draw_weights(chunks, plan.architecture, 1, 0.1)
    generator = torch.Generator().manual_seed(0)
    rows, length = config.train.micro_batch_size, config.data.seq_length
    batches = []
    for _ in range(4):
        tokens = torch.randint(0, 500, (rows, length + 1), generator=generator)
        documents = (torch.rand(rows, length, generator=generator) < 0.2).int().cumsum(1).int()
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents.diff(dim=1) != 0
        place = torch.arange(length).expand(rows, -1)
        batches.append(
            {
                "tokens": tokens[:, :-1],
                "labels": tokens[:, 1:],
                "loss_mask": (torch.rand(rows, length, generator=generator) < 0.9).float(),
                "source": torch.arange(rows) % 2,
                "position_ids": place - place.where(begins, torch.zeros_like(place)).cummax(1).values,
                "document_ids": documents,
            }
        )
    sums = run_batches(chunks, batches, 2, (rows, length), train=True)
    # Under sequence parallelism a norm's gradient here is of this rank's positions, which are others in one long row.
    whole = [p for c in chunks for p in c.parameters() if p.grad is not None and not getattr(p, "sequence_parallel", 0)]
    norm = sum(float(p.grad.square().sum()) for p in whole)
    with torch.no_grad():
        scores = score_micro_batches(chunks, batches, (rows, length))
    return sums.tolist(), None if scores is None else scores.tolist(), norm


@pytest.mark.parametrize(
    "model",
    [{}, {"pipeline_model_parallel_size": 2}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}],
    ids=["one rank", "PP2", "TP2, SP"],
)
@pytest.mark.parametrize("kernel", [None, "packed", "masked"])
def test_packed_documents_are_the_masked_ones(tmp_path: Path, model: dict[str, Any], kernel: str | None) -> None:
    """With megatron-core's rotation, and with ours on either side."""
    config = small_config(tmp_path, model, data=DOCUMENTS)
    ours = small_config(tmp_path, model | {"rope_fusion_impl": "megacpt"}, data=DOCUMENTS)
    world = max(config.model.pipeline_model_parallel_size, config.model.tensor_model_parallel_size)
    ways = {"masked": False, "packed": True}
    masked, packed = (run_ranks(losses, world, ours if kernel == name else config, way) for name, way in ways.items())
    for expected, found in zip(masked, packed, strict=True):
        assert torch.tensor(found[0]).allclose(torch.tensor(expected[0]), rtol=1e-5)
        assert (found[1] is None) == (expected[1] is None)
        if found[1] is not None:
            assert torch.tensor(found[1]).allclose(torch.tensor(expected[1]), rtol=1e-5)
        assert found[2] == pytest.approx(expected[2], rel=1e-4)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3))
def test_boundaries(lengths: list[list[int]]) -> None:
    size = max(map(sum, lengths))
    rows = [[*row, size - sum(row)] if size > sum(row) else row for row in lengths]
    ids = torch.tensor([[n for n, count in enumerate(row) for _ in range(count)] for row in rows], dtype=torch.int32)
    packed = packed_documents(ids)
    everything = [count for row in rows for count in row]
    assert packed.cu_seqlens_q.diff().tolist() == everything
    assert (packed.cu_seqlens_q.dtype, packed.cu_seqlens_q[0], packed.qkv_format) == (torch.int32, 0, "thd")
    assert packed.max_seqlen_q == packed.max_seqlen_kv == max(everything)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 3))
def test_context_parallel_ranks_share_a_sequence_and_its_triangle(size: int, unit: int, rows: int) -> None:
    length = 2 * size * unit
    tokens = torch.arange(rows * length).view(rows, length)
    batch = {"tokens": tokens, "source": torch.arange(rows)}
    parts = [context_part(batch, size, rank) for rank in range(size)]
    assert torch.cat([p["tokens"] for p in parts], 1).sort(1).values.equal(tokens)
    assert all(p["source"].equal(batch["source"]) for p in parts)
    work = [int((p["tokens"][0] + 1).sum()) for p in parts]
    assert len(set(work)) == 1
