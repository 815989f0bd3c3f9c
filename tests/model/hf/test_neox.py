"""GPT-NeoX: trains as transformers and torch's AdamW train it, across changes of layout; what is refused, by whom."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

from megacpt.config.architecture import resolve_architecture
from megacpt.config.load import config_from
from megacpt.config.tree import Config, Model
from megacpt.data.samples.batches import collate
from megacpt.data.samples.blended import BlendedDataset
from megacpt.errors import UserError
from megacpt.model.full_precision import places_of
from megacpt.model.hf.config_json import architecture_from, config_for
from megacpt.model.hf.families import LLAMA, NEOX, family_for
from megacpt.model.hf.fill import fill_weights, targets
from megacpt.model.hf.gate import check_import
from megacpt.model.hf.source import Source
from megacpt.model.hf.unfinished import Report
from megacpt.train.exchange import HFOutput, export_checkpoint
from megacpt.train.origin import open_hf
from megacpt.train.planning import make_plan
from tests.jobs import NEOX as NEOX_KEYS
from tests.jobs import Section, relative_difference, small_config, steps_then_save, steps_to, write_corpus
from tests.model.hf.models import make_model, tensors_of
from tests.model.hf.test_layouts import TOKENS, build
from tests.model.test_oracle import STEPS, TOLERANCE, History, train_llama
from tests.ranks import run_ranks

HALF = STEPS // 2
KINDS = {"pythia": 1003, "pythia-sequential": 768}
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
SP: Section = {TP: 2, "sequence_parallel": True}
RECOMPUTE: Section = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("neox")
    for kind, vocabulary in KINDS.items():
        make_model(folder / kind, kind, initializer_range=0.1)
        write_corpus(folder / f"corpus_{vocabulary}", vocabulary)
    return folder


def configuration(folder: Path, kind: str, run: str, model: Section, optimizer: Section) -> Config:
    """20 steps from a folder of transformers' making; the shape comes from there."""
    tree = small_config(folder, {"vocab_size": KINDS[kind]}).model_dump()
    tree["model"] = dict(model)
    tree["train"] |= {"train_iters": STEPS, "micro_batch_size": 2 if optimizer else 4}  # 2 for four replicas
    tree["schedule"] = {"lr_decay_style": "cosine", "lr_warmup_iters": 4}
    tree["optimizer"] |= {"clip_grad": 0.1, **optimizer}
    tree["init"] = {"hf": str(folder / kind), "gate": False}
    tree["save"] = {"dir": str(folder / run)}
    return config_from(tree, "test")


@cache
def reference_of(folder: Path, kind: str) -> History:
    """What transformers and torch do, without decay on anything but matrices; the weights it ends with are saved."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32)
    config = configuration(folder, kind, "reference", {}, {})
    history = train_llama(model, make_plan(config, 1, on_gpu=False))
    assert min(norm for _, norm in history) > config.optimizer.clip_grad
    model.save_pretrained(folder / f"{kind}-trained")
    return history


@pytest.mark.parametrize(
    ("kind", "first", "second", "optimizer"),
    [
        pytest.param("pythia", {}, SP, {}, id="parallel-TP1-to-TP2-SP"),
        pytest.param(
            "pythia",
            {**SP, PP: 2, **RECOMPUTE},
            {},
            {"use_distributed_optimizer": True},
            id="parallel-TP2xPP2-SP-to-DP4",
        ),
        pytest.param("pythia-sequential", {TP: 2}, {PP: 2}, {}, id="sequential-TP2-to-PP2"),
    ],
)
def test_twenty_steps_change_layout_half_way(
    folder: Path, kind: str, first: Section, second: Section, optimizer: Section, request: pytest.FixtureRequest
) -> None:
    run = request.node.callspec.id
    expected = reference_of(folder, kind)
    history: History = []
    world = max(layout.get(TP, 1) * layout.get(PP, 1) for layout in (first, second))
    for layout, end in ((first, HALF), (second, STEPS)):
        config = configuration(folder, kind, run, layout, optimizer)
        history += run_ranks(steps_then_save, world, config, end)[0]
    assert relative_difference(history, expected) < TOLERANCE
    export_checkpoint(folder / run / "checkpoints" / f"iter_{STEPS:07d}", HFOutput(folder / run / "out"), Report())
    found, weights = tensors_of(folder / run / "out"), tensors_of(folder / f"{kind}-trained")
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(
            found[name], weight, rtol=0, atol=3e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_model_from_fresh_weights_is_exported(tmp_path: Path) -> None:
    config = small_config(tmp_path, NEOX_KEYS)
    run_ranks(steps_then_save, 1, config, 1)
    export_checkpoint(tmp_path / "run/checkpoints/iter_0000001", HFOutput(tmp_path / "out"), Report())
    plan = make_plan(config, 1, on_gpu=False)
    dataset = BlendedDataset(plan.mixture, plan.corpora, plan.architecture.vocab_size)
    batch = collate([dataset.sample(k) for k in range(8, 16)])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        loss = F.cross_entropy(model(batch["tokens"]).logits.flatten(0, 1), batch["labels"].flatten())
    [[(second, _)]] = run_ranks(steps_to, 1, config, 2)
    assert second == pytest.approx(loss.item(), rel=TOLERANCE)


@torch.no_grad()
def import_wrongly(folder: Path) -> dict[str, str]:
    """What the gate says at TP 2 with sequence parallelism of a model that is not quite the folder's."""
    origin = open_hf(folder / "pythia")
    source = origin.source
    assert source is not None
    said = {}

    def gate(name: str) -> None:
        try:
            check_import(chunks, source, origin.architecture, TOKENS)
            said[name] = "passed"
        except UserError as error:
            said[name] = str(error)

    chunks = build(origin, (2, 1, None, True, 1))
    layers = chunks[0].decoder.layers
    fill_weights(chunks, source)
    gate("right")
    layers[1].mlp.activation_func = lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    gate("approximate GELU in layer 1")
    layers[1].mlp.activation_func = torch.nn.functional.gelu
    for layer, key in ((2, "self_attention.linear_proj.bias"), (3, "mlp.linear_fc1.layer_norm_bias")):
        found = (t for place in places_of(chunks) for t in targets(place, NEOX))
        (target,) = (t for t in found if t.layer == layer and t.weight.key.endswith(key))
        kept = target.data.clone()
        target.data.zero_()
        gate(f"no {key} in layer {layer}")
        target.data.copy_(kept)
    changed = replace(origin, architecture=replace(origin.architecture, use_parallel_residual=False))
    chunks = build(changed, (2, 1, None, True, 1))
    fill_weights(chunks, source)
    gate("residuals in sequence in layer 0")
    return said


def test_the_gate_names_the_layer(folder: Path) -> None:
    for said in run_ranks(import_wrongly, 2, folder):
        assert said.pop("right") == "passed"
        assert len(said) == 4
        for name, sentence in said.items():
            assert f"layer {name[-1]} is the first to depart" in sentence, name


def test_buffers_of_old_checkpoints_hold_no_weights(folder: Path, tmp_path: Path) -> None:
    weights = tensors_of(folder / "pythia")
    for layer in range(4):
        prefix = f"gpt_neox.layers.{layer}.attention."
        weights |= {
            f"{prefix}bias": torch.ones(1, 1, 512, 512, dtype=torch.bool).tril(),
            f"{prefix}masked_bias": torch.tensor(-1e9),
            f"{prefix}rotary_emb.inv_freq": torch.ones(2),
        }
    (tmp_path / "config.json").write_bytes((folder / "pythia" / "config.json").read_bytes())
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    assert Source(tmp_path).family is NEOX
    weights["gpt_neox.layers.0.attention.dense.scale"] = torch.ones(1)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor gpt_neox\.layers\.0\.attention\.dense\.scale is none of GPTNeoX"):
        Source(tmp_path)
    del weights["gpt_neox.layers.0.attention.dense.scale"], weights["gpt_neox.layers.3.mlp.dense_4h_to_h.bias"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor gpt_neox\.layers\.3\.mlp\.dense_4h_to_h\.bias is missing"):
        Source(tmp_path)


# Pythia-410M as published, with the field names of transformers 4.
PYTHIA_410M: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}


def test_a_published_config_is_its_preset() -> None:
    preset = resolve_architecture(Model(preset="pythia-410m"), None)
    assert architecture_from(PYTHIA_410M, "config.json") == preset
    silent = ("rotary_emb_base", "rotary_pct", "use_parallel_residual", "layer_norm_eps", "hidden_act")
    assert architecture_from({k: v for k, v in PYTHIA_410M.items() if k not in silent}, "config.json") == preset
    newer = transformers.GPTNeoXConfig.from_dict(dict(PYTHIA_410M)).to_dict()
    assert "rotary_pct" not in newer
    assert architecture_from(newer | {"architectures": PYTHIA_410M["architectures"]}, "config.json") == preset


def test_a_longer_rotary_base_leaves_the_share_that_rotates() -> None:
    for config in (PYTHIA_410M, PYTHIA_410M | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}):
        longer = replace(architecture_from(config, "config.json"), rotary_base=1e6)
        written = config_for(longer, config, NEOX)
        assert architecture_from(written, "config.json") == longer
        rope = transformers.GPTNeoXConfig.from_dict(dict(written)).rope_parameters
        assert (rope["rope_theta"], rope["partial_rotary_factor"]) == (1e6, 0.25)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act is gelu_new"),
        ({"hidden_act": "gelu_fast"}, "hidden_act is gelu_fast"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"rotary_pct": 1.5}, "field rotary_pct is 1.5, expected a number above 0, at most 1"),
        ({"rotary_pct": "0.25"}, "field rotary_pct is '0.25'"),
        ({"rotary_pct": 0.05}, "model.rotary_percent 0.05 rotates 3 of a head's 64 channels"),
        ({"use_parallel_residual": 1}, "field use_parallel_residual is 1, expected true or false"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE scaling of type 'linear'"),
    ],
)
def test_refusals(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=r"^DIR/config.json: ") as refusal:
        architecture_from(PYTHIA_410M | change, "DIR/config.json")
    assert words in str(refusal.value)


def test_the_table_of_a_model_without_one(folder: Path) -> None:
    pythia = resolve_architecture(Model(preset="pythia-1b"), None)
    llama = resolve_architecture(Model(preset="llama3-8b"), None)
    assert family_for(pythia) is NEOX
    assert family_for(llama) is LLAMA
    for mixed in (
        replace(llama, normalization="LayerNorm"),
        replace(pythia, swiglu=True),
        replace(pythia, num_query_groups=2),
        replace(pythia, kv_channels=128),
    ):
        with pytest.raises(UserError, match="has this combination of model keys: normalization"):
            family_for(mixed)
