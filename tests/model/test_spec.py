"""Which class fills each slot of the layer spec."""

from pathlib import Path

import pytest

from megacpt.config.tree import Config
from megacpt.model.build import slot_classes
from tests.jobs import NEOX, NOTHING, Section, small_config, start
from tests.ranks import run_ranks

LINEARS = "megatron.core.tensor_parallel.layers"
OURS = "megacpt.model.layers"
MEGATRON_LAYER = "megatron.core.transformer.transformer_layer.TransformerLayer"


def classes(config: Config) -> tuple[list[dict[str, str]], list[str | None]]:
    """Slots of every layer on this rank, and the class of each chunk's final norm."""
    chunks = start(config).chunks
    norms = [chunk.decoder.final_layernorm for chunk in chunks]
    names = [None if norm is None else f"{type(norm).__module__}.{type(norm).__qualname__}" for norm in norms]
    return [slot_classes(chunk) for chunk in chunks], names


@pytest.mark.parametrize("pipeline_parallel", [1, 2])
@pytest.mark.parametrize(
    ("model", "layer", "norm"),
    [
        pytest.param(NOTHING, MEGATRON_LAYER, "RMSNorm", id="llama"),
        pytest.param(NEOX, f"{OURS}.ParallelResidualLayer", "LayerNorm", id="neox"),
        pytest.param({**NEOX, "use_parallel_residual": False}, MEGATRON_LAYER, "LayerNorm", id="neox-sequential"),
    ],
)
def test_class_in_every_slot(tmp_path: Path, pipeline_parallel: int, model: Section, layer: str, norm: str):
    config = small_config(tmp_path, {**model, "pipeline_model_parallel_size": pipeline_parallel})
    results = run_ranks(classes, pipeline_parallel, config)
    for slots, _ in results:
        assert slots == [
            {
                "layer": layer,
                "input_layernorm": f"{OURS}.{norm}",
                "linear_qkv": f"{LINEARS}.ColumnParallelLinear",
                "core_attention": f"{OURS}.SDPAttention",
                "linear_proj": f"{LINEARS}.RowParallelLinear",
                "pre_mlp_layernorm": f"{OURS}.{norm}",
                "linear_fc1": f"{LINEARS}.ColumnParallelLinear",
                "linear_fc2": f"{LINEARS}.RowParallelLinear",
            }
        ]
    assert [norms for _, norms in results] == [[None]] * (pipeline_parallel - 1) + [[f"{OURS}.{norm}"]]
