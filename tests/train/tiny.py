"""A run small enough for a test: two corpora with planted statistics, a four-layer model, a handful of steps."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from megacpt.config.load import config_from
from megacpt.data.tokens.indexed import write_dataset

VOCABULARY = 1000
TIMING = ("iteration_ms", "tokens_per_second", "tflops_per_rank", "mfu", "seconds")

Tree = dict[str, Any]


def write_corpora(folder: Path) -> None:
    """medical, general and their held-out sets; empty and one-token documents among them."""
    rng = np.random.default_rng(7)
    for domain in ("medical", "general"):
        probabilities = rng.dirichlet(np.full(VOCABULARY, 0.05))
        for suffix, documents in (("", 60), ("_valid", 12)):
            lengths = rng.integers(0, 90, size=documents)
            texts = [rng.choice(VOCABULARY, size=length, p=probabilities) for length in lengths]
            write_dataset(folder / f"{domain}{suffix}", np.dtype(np.uint16), texts)


def tree(folder: Path, run: str, *changes: Tree) -> Tree:
    """The configuration, with nested changes laid over it."""
    base: Tree = {
        "precision": {"dtype": "fp32"},
        "model": {
            "preset": "tiny",
            "hidden_size": 48,
            "ffn_hidden_size": 96,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 12,
            "vocab_size": VOCABULARY,
        },
        "data": {
            "seq_length": 32,
            "sources": {
                "medical": {"path": str(folder / "medical"), "epochs": 2},
                "general": {"path": str(folder / "general"), "weight": 0.25},
            },
        },
        "train": {"micro_batch_size": 4, "global_batch_size": 8, "seed": 1234},
        "optimizer": {"lr": 3e-3, "min_lr": 3e-4},
        "schedule": {"lr_decay_style": "cosine", "lr_warmup_fraction": 0.1},
        "eval": {
            "sets": {"medical": str(folder / "medical_valid"), "general": str(folder / "general_valid")},
            "at": [0, 1],
            "every": 8,
            "iters": 2,
        },
        "save": {"dir": str(folder / run), "interval": 8, "keep_last": 2},
        "logging": {"tensorboard": False},
        "runtime": {"threads": 1},
    }
    for change in changes:
        _lay(base, deepcopy(change))
    return base


def passes(folder: Path) -> Tree:
    """Changes to four passes of 64 samples: three quarters of a new draw of medicine, one of the same general part."""
    return {
        "data": {
            "sources": {
                "medical": {"path": str(folder / "medical"), "epochs": None},
                "general": {"path": str(folder / "general"), "weight": None, "redraw": "once"},
            },
            "mixture": {"with": "medical", "replay": 0.25, "pass_tokens": 64 * 32, "passes": 4},
        },
    }


def _lay(base: Tree, change: Tree) -> None:
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _lay(base[key], value)
        else:
            base[key] = value


def layout(tp: int = 1, pp: int = 1, vp: int | None = None, *, sp: bool = False, distributed: bool = False) -> Tree:
    """The changes that lay the model out over ranks."""
    return {
        "model": {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "virtual_pipeline_model_parallel_size": vp,
            "sequence_parallel": sp,
        },
        "optimizer": {"use_distributed_optimizer": distributed},
    }


def train_here(configuration: Tree, world: int) -> dict[str, Any]:
    """Run the configuration on this rank to its end; facts about the optimizer for tests to look at."""
    from megacpt.runtime.setup import setup
    from megacpt.train.build import build_job
    from megacpt.train.loop import train
    from megacpt.train.planning import make_plan

    config = config_from(configuration, "test")
    plan = make_plan(config, world, on_gpu=False)
    rank = setup(plan.layout, config.train.seed, config.runtime.threads)
    job = build_job(plan, rank)
    train(job)
    if job.log is not None:
        job.log.close()
    inner = [part.optimizer for part in getattr(job.optimizer, "chained_optimizers", [job.optimizer])]
    states = [state for optimizer in inner for state in optimizer.state.values()]
    return {
        "steps": [float(state["step"]) for state in states],
        "own_steps": len({id(state["step"]) for state in states}) == len(states),
        "iteration": job.progress.iteration,
    }


def rows(run: Path) -> list[Tree]:
    """metrics.jsonl without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMING} for line in lines]


def losses(run: Path, after: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """lm_loss and grad_norm of the training rows after iteration `after`."""
    training = [row for row in rows(run) if "lm_loss" in row and row["iteration"] > after]
    return np.array([row["lm_loss"] for row in training]), np.array([row["grad_norm"] for row in training])
