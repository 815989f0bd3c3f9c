"""Which class fills each slot of the layer spec."""

from pathlib import Path

import pytest

from megacpt.config.tree import Config
from megacpt.model.build import slot_classes
from tests.jobs import small_config, start
from tests.ranks import run_ranks

LINEARS = "megatron.core.tensor_parallel.layers"
OURS = "megacpt.model.layers"


def classes(config: Config) -> tuple[list[dict[str, str]], list[str | None]]:
    """Slots of every layer on this rank, and the class of each chunk's final norm."""
    chunks = start(config).chunks
    norms = [chunk.decoder.final_layernorm for chunk in chunks]
    names = [None if norm is None else f"{type(norm).__module__}.{type(norm).__qualname__}" for norm in norms]
    return [slot_classes(chunk) for chunk in chunks], names


@pytest.mark.parametrize("pipeline_parallel", [1, 2])
def test_class_in_every_slot(tmp_path: Path, pipeline_parallel: int):
    config = small_config(tmp_path, {"pipeline_model_parallel_size": pipeline_parallel})
    results = run_ranks(classes, pipeline_parallel, config)
    for slots, _ in results:
        assert slots == [
            {
                "input_layernorm": f"{OURS}.RMSNorm",
                "linear_qkv": f"{LINEARS}.ColumnParallelLinear",
                "core_attention": f"{OURS}.SDPAttention",
                "linear_proj": f"{LINEARS}.RowParallelLinear",
                "pre_mlp_layernorm": f"{OURS}.RMSNorm",
                "linear_fc1": f"{LINEARS}.ColumnParallelLinear",
                "linear_fc2": f"{LINEARS}.RowParallelLinear",
            }
        ]
    assert [norms for _, norms in results] == [[None]] * (pipeline_parallel - 1) + [[f"{OURS}.RMSNorm"]]
