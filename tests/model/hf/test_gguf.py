"""GGUF files read slice by slice: bit for bit what transformers makes of them whole."""

from pathlib import Path

import gguf
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from megacpt.config.tree import Model
from megacpt.errors import UserError
from megacpt.model.hf.source import Source
from megacpt.model.hf.unfinished import Report
from megacpt.runtime.setup import Layout, setup
from megacpt.train.exchange import Conversion, import_model
from megacpt.train.origin import open_hf
from tests.model.hf.models import make_model, tensors_of, write_gguf
from tests.ranks import run_ranks

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_key_value_heads": 2}
QUERY, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module", params=["openllama", "tied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("source") / "model", request.param, **SHAPE)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1])
def test_every_slice_is_that_of_transformers(source: Path, tmp_path: Path, kind: Kind) -> None:
    folder = write_gguf(source, tmp_path, kind)
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32
    ).state_dict()
    found = Source(folder)
    assert expected.keys() - found.tensors.keys() <= {"lm_head.weight"}
    for name in found.tensors:
        assert torch.equal(found.read(name), expected[name]), name
    for name in (QUERY, DOWN, "model.embed_tokens.weight"):
        for where in ((slice(3, 41), slice(0, 64)), (slice(17, 18), slice(5, 50)), (slice(9, 9), slice(0, 64))):
            assert torch.equal(found.read(name, where), expected[name][where]), (name, where)
    if kind is Kind.F32:
        original = tensors_of(source)
        assert all(torch.equal(found.read(name), original[name]) for name in original)


def test_rows_are_dequantised_piece_by_piece(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Source(write_gguf(source, tmp_path, Kind.Q8_0))
    where = (slice(2, 39), slice(1, 60))
    whole = found.read(QUERY, where)
    largest: list[int] = []
    dequantise = gguf.dequantize

    def counting(data, kind):  # type: ignore[no-untyped-def]
        values = dequantise(data, kind)
        largest.append(values.size)
        return values

    monkeypatch.setattr(gguf, "dequantize", counting)
    monkeypatch.setattr("megacpt.model.hf.gguf.CHUNK", 300)
    assert torch.equal(found.read(QUERY, where), whole)
    assert max(largest) <= 300


def import_here(folder: Path, output: Path) -> str:
    setup(Layout(2, tensor=2), seed=0, threads=1)
    _, verdict = import_model(open_hf(folder), Model(tensor_model_parallel_size=2), Conversion(output), Report())
    return str(verdict)


def test_imported_on_two_ranks(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", "openllama", **SHAPE)
    (tmp_path / "model").mkdir()
    folder = write_gguf(source, tmp_path / "model", Kind.Q4_0)
    verdicts = run_ranks(import_without_tokenizer, 2, folder, tmp_path / "out")
    assert all(verdict.startswith("gate passed") for verdict in verdicts)


def import_without_tokenizer(folder: Path, output: Path) -> str:
    """These files have none to write."""
    from megacpt.train import origin

    origin.write_tokenizer = lambda path, target: target.mkdir(parents=True)  # this process is the test's own
    return import_here(folder, output)


def test_bad_files(source: Path, tmp_path: Path) -> None:
    factors = {"rope_freqs.weight": torch.tensor([1.0, 8.0])}
    folder = write_gguf(source, tmp_path, Kind.Q8_0, **factors)
    with pytest.raises(UserError, match=r"model.gguf: holds RoPE scaling as rope_freqs.weight, which transformers"):
        Source(folder)
    write_gguf(source, tmp_path, Kind.Q8_0, **{"rope_freqs.weight": torch.ones(4)})
    Source(folder)
    write_gguf(source, tmp_path, Kind.Q8_0, **{"model.layers.0.self_attn.v_proj.bias": torch.ones(32)})
    with pytest.raises(UserError, match=r"tensor blk.0.attn_v.bias is none of LlamaForCausalLM's"):
        Source(folder)
    data = (folder / "model.gguf").read_bytes()
    (folder / "model.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"model.gguf: truncated"):
        Source(folder)
