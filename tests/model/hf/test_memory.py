"""Import's peak memory, by format: the rank's own parameters, and at most 1.3 times the source's largest file."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from megacpt.config.tree import Model
from megacpt.model.build import BuildOptions, build_chunks, transformer_config
from megacpt.model.hf.fill import fill_weights
from megacpt.model.hf.source import Source
from megacpt.runtime.setup import Layout, setup
from tests.model.hf.models import make_model, write_gguf
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


def in_files(source: Path, kind: str, folder: Path) -> Path:
    """The model in other files: a `.bin` for each safetensors file, or one GGUF file."""
    if kind == "safetensors":
        return source
    folder.mkdir()
    if kind == "gguf":
        return write_gguf(source, folder, gguf.GGMLQuantizationType.Q8_0)
    index = json.loads((source / "model.safetensors.index.json").read_text().replace(".safetensors", ".bin"))
    for path in source.glob("*.safetensors"):
        torch.save(safetensors.torch.load_file(path), folder / path.with_suffix(".bin").name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    shutil.copy(source / "config.json", folder)
    return folder


@pytest.mark.skipif(not STATUS.exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("kind", "tp", "pp"),
    [
        ("safetensors", 1, 1),
        ("safetensors", 2, 1),
        ("safetensors", 1, 2),
        ("bin", 2, 1),
        ("gguf", 1, 1),
        ("gguf", 2, 1),
    ],
)
def test_peak_memory_of_an_import(kind: str, tp: int, pp: int, source: Path, tmp_path: Path) -> None:
    folder = in_files(source, kind, tmp_path / kind)
    shard = max(path.stat().st_size for path in folder.iterdir())
    for found in run_ranks(import_here, tp * pp, folder, tp, pp):
        print(f"{kind} TP {tp} PP {pp}: {found}, largest file {shard}")
        assert found["own"] < found["rise"] <= found["own"] + 1.3 * shard


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    return make_model(folder, "openllama", max_shard="40MB", num_attention_heads=12, num_key_value_heads=12, **SHAPE)
