"""An independent oracle: transformers' Llama and torch's AdamW, on the same weights and the same batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from megacpt.config.architecture import Architecture, resolve_architecture
from megacpt.config.tree import Config
from megacpt.data.samples.batches import collate
from megacpt.data.samples.blended import BlendedDataset
from megacpt.train.plan import Plan
from megacpt.train.planning import make_plan
from tests.jobs import Section, relative_difference, small_config, start, step
from tests.ranks import run_ranks

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
Weights = Mapping[str, torch.Tensor]
History = list[tuple[float, float]]
TOLERANCE = 2e-6
STEPS = 20
LONG = 1024
MODELS: Mapping[str, Section] = {
    "untied-gqa": {},
    "tied": {"untie_embeddings_and_output_weights": False},
    "rope-factor-8": {"rope_scaling_factor": 8.0},
    "rope-factor-32-tied": {"rope_scaling_factor": 32.0, "untie_embeddings_and_output_weights": False},
    "kv-channels": {"kv_channels": 20, "num_query_groups": 4},
    "vocabulary-1000": {"vocab_size": 1000, "num_query_groups": 1, "rotary_base": 500_000},
}


@dataclass(frozen=True)
class Case:
    """A model of transformers' making, and megacpt's configuration that starts from its weights."""

    config: Config
    architecture: Architecture
    weights: Path

    @property
    def checkpoint(self) -> str:
        """The same weights, as megacpt saved them at TP 1."""
        return str(Path(self.config.save.dir) / "checkpoints")


def llama(shape: Architecture, *, scaled: bool = True) -> torch.nn.Module:
    """transformers' model of this shape, from a fixed seed, with norms that are not all ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope: dict[str, object] = {"rope_type": "default", "rope_theta": shape.rotary_base}
    if shape.rope_scaling_factor is not None and scaled:
        bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        rope |= {"rope_type": "llama3", "factor": shape.rope_scaling_factor, **bounds}
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        rms_norm_eps=shape.norm_epsilon,
        max_position_embeddings=131_072,
        tie_word_embeddings=not shape.untie_embeddings_and_output_weights,
        rope_parameters=rope,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    torch.manual_seed(7)
    model = LlamaForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    return model


def megatron_weights(hf: Weights, shape: Architecture) -> dict[str, torch.Tensor]:
    """transformers' names and rows as megacpt's at TP 1, without vocabulary padding.

    linear_qkv holds, for each query group, its query heads, its key and its value; linear_fc1 the gate, then up.
    """
    weights = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    if shape.untie_embeddings_and_output_weights:
        weights["output_layer.weight"] = hf["lm_head.weight"]
    for number in range(shape.num_layers):
        ours, theirs = f"decoder.layers.{number}.", f"model.layers.{number}."
        by_group = [
            hf[f"{theirs}self_attn.{name}_proj.weight"].unflatten(0, (shape.num_query_groups, -1)) for name in "qkv"
        ]
        halves = [hf[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        weights |= {
            f"{ours}input_layernorm.weight": hf[f"{theirs}input_layernorm.weight"],
            f"{ours}self_attention.linear_qkv.weight": torch.cat(by_group, 1).flatten(0, 1),
            f"{ours}self_attention.linear_proj.weight": hf[f"{theirs}self_attn.o_proj.weight"],
            f"{ours}pre_mlp_layernorm.weight": hf[f"{theirs}post_attention_layernorm.weight"],
            f"{ours}mlp.linear_fc1.weight": torch.cat(halves),
            f"{ours}mlp.linear_fc2.weight": hf[f"{theirs}mlp.down_proj.weight"],
        }
    return weights


def save_as_checkpoint(case: Case) -> None:
    """Put the weights into a job on one rank, and save it."""
    job = start(case.config)
    (chunk,) = job.chunks
    weights = megatron_weights(torch.load(case.weights), case.architecture)
    parameters = dict(chunk.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].zero_()
            parameters[name][: len(weight)] = weight
    job.save()


def logits_of(config: Config, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, padded vocabulary] of a run's initial weights, from the parts of all tensor-parallel ranks."""
    (chunk,) = start(config).chunks
    with torch.no_grad():
        part = chunk(tokens_BS, torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS), None)
    parts = [torch.empty_like(part) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    torch.distributed.all_gather(parts, part.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, -1)


def steps_of(config: Config) -> tuple[History, dict[str, torch.Tensor]]:
    """Loss and gradient norm of each step, and this rank's weights after the last."""
    job = start(config)
    history = [step(job) for _ in range(STEPS)]
    return history, {name: weight.detach() for chunk in job.chunks for name, weight in chunk.named_parameters()}


def train_llama(model: torch.nn.Module, plan: Plan) -> History:
    """What `steps_of` does, by transformers and torch alone, a whole global batch at once."""
    settings = plan.config.optimizer
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
    )
    dataset = BlendedDataset(plan.mixture, plan.corpora, plan.architecture.vocab_size)
    size = plan.config.train.global_batch_size
    history = []
    for iteration in range(STEPS):
        batch = collate([dataset.sample(k) for k in range(iteration * size, (iteration + 1) * size)])
        counts = batch["loss_mask"].bool()
        loss = F.cross_entropy(model(batch["tokens"]).logits[counts], batch["labels"][counts])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(iteration + 1)
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return history


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("oracle")


@cache
def case_of(folder: Path, name: str) -> Case:
    """A model, transformers' weights of it, and the same weights as a checkpoint."""
    folder = folder / name
    folder.mkdir()
    model = {"num_layers": 2, "max_position_embeddings": LONG, **MODELS[name]}
    schedule = {"lr_decay_style": "cosine", "lr_warmup_iters": 4}
    config = small_config(folder, model, train={"train_iters": STEPS}, schedule=schedule)
    case = Case(config, resolve_architecture(config.model, None), folder / "llama.pt")
    torch.save(llama(case.architecture).state_dict(), case.weights)
    run_ranks(save_as_checkpoint, 1, case)
    return case


@cache
def reference_of(folder: Path, name: str) -> tuple[History, Weights]:
    """What transformers and torch do: history, and the weights after it under our names."""
    case = case_of(folder, name)
    model = llama(case.architecture)
    history = train_llama(model, make_plan(from_checkpoint(case, {}), 1, on_gpu=False))
    return history, megatron_weights(model.state_dict(), case.architecture)


def from_checkpoint(case: Case, layout: Section) -> Config:
    """The case's run in another layout, started from the case's weights."""
    return case.config.model_copy(
        update={
            "model": case.config.model.model_copy(update=dict(layout)),
            "init": case.config.init.model_copy(update={"checkpoint": case.checkpoint}),
            "save": case.config.save.model_copy(update={"dir": case.config.save.dir + "_from_checkpoint"}),
        }
    )


def long_tokens(shape: Architecture) -> torch.Tensor:
    return torch.randint(shape.vocab_size, (1, LONG), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_logits(folder: Path, name: str, tensor_parallel: int):
    case = case_of(folder, name)
    tokens, size = long_tokens(case.architecture), case.architecture.vocab_size
    with torch.no_grad():
        expected = llama(case.architecture)(tokens).logits
    config = from_checkpoint(case, {TP: tensor_parallel})
    for logits in run_ranks(logits_of, tensor_parallel, config, tokens):
        torch.testing.assert_close(logits[..., :size], expected, rtol=1e-5, atol=3e-5)
        assert logits[..., size:].isneginf().all()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_scaling_matters_at_these_positions(folder: Path, factor: float):
    """Or the comparison of logits would say nothing about it."""
    shape = case_of(folder, {8.0: "rope-factor-8", 32.0: "rope-factor-32-tied"}[factor]).architecture
    assert shape.rope_scaling_factor == factor
    with torch.no_grad():
        scaled, plain = (llama(shape, scaled=scaled)(long_tokens(shape)).logits for scaled in (True, False))
    assert (scaled - plain).abs().max() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps(folder: Path, name: str):
    case = case_of(folder, name)
    expected, expected_weights = reference_of(folder, name)
    assert min(norm for _, norm in expected) > case.config.optimizer.clip_grad
    [(history, weights)] = run_ranks(steps_of, 1, from_checkpoint(case, {}))
    assert relative_difference(history, expected) < TOLERANCE
    for parameter, weight in expected_weights.items():
        torch.testing.assert_close(weights[parameter][: len(weight)], weight, rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, {TP: 2, PP: 2, "sequence_parallel": True}) for name in MODELS),
        ("untied-gqa", {TP: 2}),
        ("untied-gqa", {PP: 2}),
        ("tied", {PP: 2}),
    ],
)
def test_twenty_steps_in_parallel(folder: Path, name: str, layout: Section):
    config = from_checkpoint(case_of(folder, name), layout)
    world = config.model.tensor_model_parallel_size * config.model.pipeline_model_parallel_size
    for history, _ in run_ranks(steps_of, world, config):
        assert relative_difference(history, reference_of(folder, name)[0]) < TOLERANCE
