"""Small training jobs on real files, and what their steps gave: shared by the tests of model and step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megacpt.config.load import config_from
from megacpt.config.tree import Config
from megacpt.data.tokens.indexed import write_dataset
from megacpt.runtime.setup import setup
from megacpt.train.build import build_job
from megacpt.train.job import Job
from megacpt.train.optimizer import main_and_model_parameters, optimizer_parts, own_shards, updated_by
from megacpt.train.planning import make_plan

Section = Mapping[str, Any]
NOTHING: Section = MappingProxyType({})
VOCABULARY = 500
SHAPE: Section = {
    "num_layers": 4,
    "hidden_size": 48,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "rotary_base": 10_000,
    "norm_epsilon": 1e-5,
    "untie_embeddings_and_output_weights": True,
    "max_position_embeddings": 512,
    "vocab_size": VOCABULARY,
    "init_method_std": 0.1,
}
NEOX: Section = {
    "num_query_groups": 4,
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "rotary_percent": 0.34,
    "use_parallel_residual": True,
}
"""What makes GPT-NeoX of SHAPE; 4 of a head's 12 channels rotate."""
SEQ_LENGTH = 24


def write_corpus(prefix: Path, vocab_size: int = VOCABULARY, documents: int = 60, seed: int = 0) -> None:
    """Documents of 5 to 60 tokens, each a walk of constant stride, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    draws = ((5, 60), (0, vocab_size), (1, 9))
    shapes = zip(*(rng.integers(low, high, documents) for low, high in draws), strict=True)
    walks = ((np.arange(length) * stride + first) % vocab_size for length, first, stride in shapes)
    write_dataset(prefix, np.dtype(np.uint16), (walk.astype(np.uint16) for walk in walks))


def small_config(folder: Path, model: Section = NOTHING, **sections: Section) -> Config:
    """10 steps of 8 samples in two micro-batches, fp32, on a corpus that is kept in `folder`.

    Adam's epsilon is far above rounding errors of gradients: with the usual 1e-8, a parameter with next to no gradient
    moves a whole learning rate in a direction that rounding decides, and no two layouts agree better than 1e-5.
    """
    shape = dict(SHAPE) | dict(model)
    corpus = folder / f"corpus_{shape['vocab_size']}"
    if not corpus.with_suffix(".idx").exists():
        write_corpus(corpus, shape["vocab_size"])
    tree: dict[str, dict[str, Any]] = {
        "model": shape,
        "precision": {"dtype": "fp32"},
        "data": {"seq_length": SEQ_LENGTH, "sources": {"walks": {"path": str(corpus), "weight": 1}}, "num_workers": 0},
        "train": {"train_iters": 10, "micro_batch_size": 4, "global_batch_size": 8},
        "optimizer": {"lr": 3e-3, "weight_decay": 0.1, "clip_grad": 0.5, "adam_eps": 1e-5},
        "schedule": {"lr_decay_style": "constant"},
        "save": {"dir": str(folder / "run")},
        "logging": {"tensorboard": False},
        "runtime": {"threads": 1},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | dict(section)
    return config_from(tree, "test")


def importing_config(
    folder: Path, source: Path, vocab_size: int, layout: Section = NOTHING, **sections: Section
) -> Config:
    """The same from a Hugging Face folder, which brings the shape."""
    tree = small_config(folder, {"vocab_size": vocab_size}, **sections).model_dump()
    return config_from(tree | {"model": dict(layout), "init": {"hf": str(source)}}, "test")


def start(config: Config) -> Job:
    """Plan, set up and build on this rank."""
    plan = make_plan(config, dist.get_world_size(), on_gpu=False)
    return build_job(plan, setup(plan.layout, config.train.seed, config.runtime.threads))


def step(job: Job) -> tuple[float, float]:
    """One step: mean loss per token and gradient norm, which every rank knows."""
    grad_norm = job.step(job.next_batch(), job.plan.learning_rate(job.progress.iteration + 1))
    loss, tokens = job.progress.interval.sum(1).tolist()
    job.progress.interval.zero_()
    return loss / tokens, grad_norm


def steps_to(config: Config, iteration: int, *, save: bool = False) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of a run, from where it stands to `iteration`; optionally a checkpoint."""
    job = start(config)
    history = [step(job) for _ in range(job.progress.iteration, iteration)]
    if save:
        job.save()
    return history


def steps_then_save(config: Config, iteration: int) -> list[tuple[float, float]]:
    """`steps_to`, and a checkpoint at its end."""
    return steps_to(config, iteration, save=True)


def train_steps(config: Config) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of a whole run of `train.train_iters`."""
    assert config.train.train_iters is not None
    return steps_to(config, config.train.train_iters)


def relative_difference(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    """The largest |found / expected - 1|."""
    ratio = torch.tensor(found, dtype=torch.float64) / torch.tensor(expected, dtype=torch.float64)
    return float((ratio - 1).abs().max())


def parameters_of(job: Job) -> dict[str, torch.Tensor]:
    """This rank's parameters by chunk and name, as floats."""
    return {
        f"{number}.{name}": parameter.detach().float().clone()
        for number, chunk in enumerate(job.chunks)
        for name, parameter in chunk.named_parameters()
    }


def main_parameters_of(job: Job) -> dict[str, tuple[slice, torch.Tensor]]:
    """By the same names: which elements of the flat parameter this rank updates, and their fp32 main parameters."""
    names = {
        parameter: f"{number}.{name}"
        for number, chunk in enumerate(job.chunks)
        for name, parameter in chunk.named_parameters()
    }
    found = {}
    for part in optimizer_parts(job.optimizer):
        if isinstance(part, DistributedOptimizer):
            for _, parameter, span in own_shards(part):
                found[names[parameter]] = span, updated_by(part, parameter).detach().clone()
        else:
            for main, parameter in main_and_model_parameters(part):
                found[names[parameter]] = slice(None), main.detach().flatten().clone()  # type: ignore[index]
    return found
