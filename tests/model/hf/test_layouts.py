"""Models made by transformers, imported at every layout: the same logits, a passing gate, every bit exported."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megacpt.config.tree import Model
from megacpt.errors import UserError
from megacpt.model.build import BuildOptions, build_chunks, transformer_config
from megacpt.model.full_precision import places_of
from megacpt.model.gpt import LanguageModel
from megacpt.model.hf.families import FAMILIES
from megacpt.model.hf.fill import Target, fill_target, fill_weights, targets
from megacpt.model.hf.gate import _forward, check_import
from megacpt.model.hf.unfinished import Report
from megacpt.runtime.setup import Layout, setup
from megacpt.train.checkpoint import save_weights
from megacpt.train.exchange import HFOutput, export_checkpoint
from megacpt.train.origin import Origin, open_hf
from tests.model.hf.models import SHAPES, make_model, tensors_of, transformers_logits
from tests.ranks import run_ranks

Cut = tuple[int, int, int | None, bool, int]  # TP, PP, virtual stages, sequence parallelism, CP
LAYOUTS: dict[str, Cut] = {
    "TP1": (1, 1, None, False, 1),
    "TP2": (2, 1, None, True, 1),
    "PP2": (1, 2, 2, False, 1),
    "TP2xPP2": (2, 2, None, False, 1),
}
SHARED_SEQUENCES: Cut = (2, 1, None, True, 2)
TOKENS = torch.randint(0, 640, (2, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in SHAPES:
        make_model(folder / kind, kind)
        assert len(list((folder / kind).glob("*.safetensors"))) > 1
    make_model(folder / "bf16", "llama3", torch.bfloat16)
    return folder


def build(origin: Origin, cut: Cut, dtype: torch.dtype = torch.float32) -> list[LanguageModel]:
    """The model at a layout, not filled."""
    tp, pp, vp, sp, cp = cut
    parallel_state.destroy_model_parallel()
    setup(Layout(dist.get_world_size(), tp, pp, vp, cp), seed=1, threads=1)
    model = Model(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        sequence_parallel=sp,
        context_parallel_size=cp,
        make_vocab_size_divisible_by=128,
    )
    options = BuildOptions(dtype, restart_positions=False)
    config = transformer_config(origin.architecture, model, options)
    return build_chunks(origin.architecture, model, config, options)


def logits_of(chunks: list[LanguageModel]) -> torch.Tensor | None:
    """This rank's columns of the logits, without padding; None before the last stage."""
    batches = [row[None] for row in TOKENS]
    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=[iter(batches) for _ in chunks],
            model=chunks,
            num_microbatches=len(batches),
            micro_batch_size=1,
            seq_length=TOKENS.shape[1],
            forward_only=True,
            collect_non_loss_data=True,
        )
    return torch.cat(found)[..., : chunks[-1].real_rows] if found else None


def convert_all(models: Path, exports: Path, cut: Cut) -> dict[str, torch.Tensor | None]:
    """Import, gate, save, export every model; this rank's logits of each."""
    results = {}
    for kind in SHAPES:
        origin = open_hf(models / kind)
        assert origin.source is not None
        chunks = build(origin, cut)
        fill_weights(chunks, origin.source)
        verdict = check_import(chunks, origin.source, origin.architecture, TOKENS)
        assert max(verdict.ratios) < 0.1
        results[kind] = logits_of(chunks)
        write_base = partial(origin.write, architecture=origin.architecture)
        folder = save_weights(exports / f"{kind}_checkpoint", chunks, write_base)
        output = HFOutput(exports / kind, shard_bytes=200_000)
        export_checkpoint(folder, output, Report())
    return results


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_model_at_every_layout(name: str, models: Path, tmp_path: Path) -> None:
    cut = LAYOUTS[name]
    by_rank = run_ranks(convert_all, cut[0] * cut[1], models, tmp_path, cut)
    for kind in SHAPES:
        shards = [results[kind] for results in by_rank if results[kind] is not None]
        assert len(shards) == cut[0]
        expected = transformers_logits(models / kind, TOKENS)
        torch.testing.assert_close(torch.cat(shards, dim=-1), expected, rtol=1e-4, atol=1e-4)
        source, exported = tensors_of(models / kind), tensors_of(tmp_path / kind)
        assert source.keys() == exported.keys()
        assert all(torch.equal(source[name], exported[name]) for name in source)
        assert torch.equal(transformers_logits(tmp_path / kind, TOKENS), expected)
    assert (tmp_path / "llama3" / "model.safetensors.index.json").is_file()
    assert "base model | llama3" in (tmp_path / "llama3" / "README.md").read_text()


@torch.no_grad()
def import_wrongly(models: Path, cut: Cut, layer: int) -> list[str]:
    """Import with gate and up swapped in one layer, or an end's rows upside down; what the gate says of each."""
    origin = open_hf(models / "llama3")
    assert origin.source is not None
    sentences = []
    chunks = build(origin, cut)
    for damage in ("swap", "embedding", "output"):
        fill_weights(chunks, origin.source)
        for target in (t for place in places_of(chunks) for t in targets(place, FAMILIES["LlamaForCausalLM"])):
            wrong = {
                "swap": target.layer == layer and target.weight.key.endswith("linear_fc1.weight"),
                "embedding": target.weight.key == "embedding.word_embeddings.weight",
                "output": target.weight.key == "output_layer.weight",
            }
            if wrong[damage]:
                target.data.copy_(_swapped(target, origin) if damage == "swap" else target.data.flip(0))
        try:
            check_import(chunks, origin.source, origin.architecture, TOKENS)
        except UserError as error:
            sentences.append(str(error))
    return sentences


def _swapped(target: Target, origin: Origin) -> torch.Tensor:
    assert origin.source is not None
    rows = origin.architecture.ffn_hidden_size
    other = (target.offset[0] + rows) % (2 * rows)
    swapped = Target(target.weight, target.layer, (other, *target.offset[1:]), torch.empty_like(target.data))
    fill_target(swapped, origin.source)
    return swapped.data


@pytest.mark.parametrize("name", ["TP1", "TP2", "TP2xPP2", "TP2xCP2"])
def test_the_gate_names_the_layer(name: str, models: Path) -> None:
    cut = LAYOUTS.get(name, SHARED_SEQUENCES)
    for sentences in run_ranks(import_wrongly, cut[0] * cut[1] * cut[4], models, cut, 2):
        assert len(sentences) == 3
        assert "layer 2 is the first to depart" in sentences[0]
        assert "the embedding is the first to depart" in sentences[1]
        assert "the final norm or output layer is the first to depart" in sentences[2]


def gate_in_bf16(models: Path) -> tuple[float, str]:
    """The verdict on a bf16 model in bf16, and what the gate says of one whose layer 1 lost its key rows' order."""
    origin = open_hf(models / "bf16")
    assert origin.source is not None
    assert origin.source.dtype is torch.bfloat16
    chunks = build(origin, LAYOUTS["TP1"], torch.bfloat16)
    fill_weights(chunks, origin.source)
    passed = check_import(chunks, origin.source, origin.architecture, TOKENS)
    weight = chunks[0].decoder.layers[1].self_attention.linear_qkv.weight
    weight.data[24:36] = weight.data[24:36].flip(0)
    try:
        check_import(chunks, origin.source, origin.architecture, TOKENS)
    except UserError as error:
        return max(passed.ratios), str(error)
    return max(passed.ratios), ""


def test_the_gate_in_bf16(models: Path) -> None:
    ((worst, sentence),) = run_ranks(gate_in_bf16, 1, models)
    assert worst < 1
    assert "layer 1 is the first to depart" in sentence
