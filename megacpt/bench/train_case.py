"""What the contestants of `bench.py train` train: a model folder with random weights, random tokens, one configuration.

All read the same YAML: ours as it is, the others for its weights, its batches and its optimizer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import yaml

from megacpt.bench.processes import run_module
from megacpt.config.presets import MODEL_PRESETS
from megacpt.data.tokens.indexed import write_dataset
from megacpt.files import write_text

WARMUP = 3
"""Steps that are not timed: memory is allocated, kernels are chosen."""


@dataclass(frozen=True)
class TrainCase:
    """A model and a batch. `shape`: fields that differ from the preset's."""

    name: str
    preset: str
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    shape: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fields(self) -> dict[str, Any]:
        """The model's shape under Megatron's names."""
        return dict(MODEL_PRESETS[self.preset]) | dict(self.shape)

    @property
    def title(self) -> str:
        """For a row."""
        return f"{self.name}, sequences of {self.seq_length:,}, {self.global_batch_size} a step"


GPU_CASES: Mapping[str, TrainCase] = MappingProxyType(
    {
        "smollm2-135m": TrainCase("smollm2-135m", "smollm2-135m", 2048, 16, 32),
        "1b": TrainCase("llama3.2-1b", "llama3.2-1b", 8192, 1, 4),
        # OpenLLaMA's heads of 100 channels fit no fused attention.
        "3b": TrainCase("llama3.2-3b", "llama3.2-3b", 4096, 1, 4),
        "8b-slice": TrainCase("8 layers of llama3-8b", "llama3-8b", 8192, 1, 2, {"num_layers": 8}),
    }
)
CPU_CASES: Mapping[str, TrainCase] = MappingProxyType(
    {
        "tiny": TrainCase("tiny", "tiny", 256, 8, 16, {"vocab_size": 4096}),
        "smollm2-135m": TrainCase("smollm2-135m", "smollm2-135m", 256, 1, 2),
    }
)


def write_case(case: TrainCase, folder: Path, dtype: str, steps: int, limit: float = math.inf) -> Path:
    """Write model, tokens and configuration below `folder`; returns the configuration's path.

    Raises:
        TimeUp: the model was not written after `limit` seconds.
        UserError: the model cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, length = case.fields["vocab_size"], case.seq_length
    documents = case.global_batch_size * (steps + 1)
    rng = np.random.default_rng(0)
    itemtype = np.dtype(np.uint16 if vocabulary <= 65_500 else np.int32)
    write_dataset(
        folder / "tokens", itemtype, (rng.integers(0, vocabulary, length).astype(itemtype) for _ in range(documents))
    )
    config = {
        "precision": {"dtype": dtype},
        "model": {},
        "init": {"hf": str(folder / "model")},
        "data": {
            "seq_length": length,
            "sources": {"random": {"path": str(folder / "tokens"), "weight": 1.0}},
            "num_workers": 0,
        },
        "train": {
            "train_iters": steps,
            "micro_batch_size": case.micro_batch_size,
            "global_batch_size": case.global_batch_size,
            "log_interval": steps,
        },
        "optimizer": {"lr": 1e-5, "min_lr": 1e-5, "weight_decay": 0.1, "clip_grad": 1.0},
        "schedule": {"lr_decay_style": "constant"},
        "eval": {"at": []},
        "save": {"dir": str(folder / "run")},
        "logging": {"tensorboard": False},
    }
    path = folder / "run.yaml"
    write_text(path, yaml.safe_dump(config, sort_keys=False))
    write_text(folder / "shape.yaml", yaml.safe_dump(case.fields))
    run_module("megacpt.bench.train_hf", "--make", folder / "shape.yaml", folder / "model", dtype, limit=limit)
    return path
