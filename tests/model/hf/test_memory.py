"""Import's peak memory: the rank's own parameters, and no more than 1.3 times the largest file of the source."""

from pathlib import Path

import pytest
import torch.distributed as dist

from megacpt.config.tree import Model
from megacpt.model.build import BuildOptions, build_chunks, transformer_config
from megacpt.model.hf.fill import fill_weights
from megacpt.model.hf.source import Source
from megacpt.runtime.setup import Layout, setup
from tests.model.hf.models import make_model
from tests.ranks import run_ranks

STATUS = Path("/proc/self/status")
SHAPE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 8192}


def resident(key: str) -> int:
    """Bytes that /proc/self/status gives for VmRSS or VmHWM."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def import_here(folder: Path, tp: int, pp: int) -> dict[str, int]:
    """Bytes: how far resident memory rose at most while a rank built and filled its part, and what that part holds."""
    source = Source(folder)
    rank = setup(Layout(dist.get_world_size(), tp, pp), seed=1, threads=1)
    model = Model(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    options = BuildOptions(source.dtype, restart_positions=False)
    config = transformer_config(source.architecture, model, options)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    chunks = build_chunks(source.architecture, model, config, options)
    fill_weights(chunks, source)
    own = sum(p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters())
    return {"rank": rank.rank, "rise": resident("VmHWM") - before, "own": own}


@pytest.mark.skipif(not STATUS.exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_peak_memory_of_an_import(tp: int, pp: int, source: Path) -> None:
    shard = max(path.stat().st_size for path in source.glob("*.safetensors"))
    for found in run_ranks(import_here, tp * pp, source, tp, pp):
        print(f"TP {tp} PP {pp}: {found}, largest shard {shard}")
        assert found["own"] < found["rise"] <= found["own"] + 1.3 * shard


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    return make_model(folder, "openllama", max_shard="40MB", num_attention_heads=12, num_key_value_heads=12, **SHAPE)
