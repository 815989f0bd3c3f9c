"""Run folders with every kind of row, their numbers from formulas."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

TASKS = {"pubmedqa": 0.684, "medmcqa": 0.254, "medqa_4options": 0.254, "mmlu_medical": 0.256}
EVALUATIONS = (0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 200)
TOKENS = 4096


def dip(step: int, depth: float, turn: float, gain: float) -> float:
    """A V: down by `depth` at `turn`, then up to `gain` in the long run; 0 at step 0."""
    late = 1 - math.exp(-step / (4 * turn))
    return -depth * math.e * step / turn * math.exp(-step / turn) + gain * late


def rows_of(
    steps: int = 200, *, depth: float = 0.06, seed: int = 1, missing: str | None = None
) -> list[dict[str, Any]]:
    """The rows of a run of `steps` steps, one training row each."""
    noise = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for step in range(steps + 1):
        common = {"iteration": step, "consumed_samples": 16 * step, "consumed_tokens": TOKENS * step}
        if step:
            rows.append(common | training(step, steps, noise))
        if step in EVALUATIONS:
            rows += [common | row for row in evaluations(step, depth, noise, missing)]
            if step:
                rows += [common | weight_update(step), common | probe(step)]
    return rows


def training(step: int, steps: int, noise: np.random.Generator) -> dict[str, Any]:
    losses = {"medical": 4.5 + 3 * math.exp(-step / 40), "general": 5.2 + 0.3 * math.exp(-step / 30)}
    losses = {name: loss + float(noise.normal(0, 0.1)) for name, loss in losses.items()}
    return {
        "lm_loss": 0.82 * losses["medical"] + 0.18 * losses["general"],
        "grad_norm": 0.6 + math.exp(-step / 30) + float(noise.normal(0, 0.05)),
        "learning_rate": 1.5e-3 * min(step / 20, 0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2),
        "loss_by_source": losses,
        "tokens_by_source": {"medical": 3359, "general": TOKENS - 3359},
        "epochs_by_source": {"medical": step * 0.00195, "general": step * 0.00029},
        "global_batch_size": 16,
        "skipped_iterations": 0,
        "nan_iterations": 0,
        "iteration_ms": 800.0,
        "tokens_per_second": 5100.0 + float(noise.normal(0, 300)),
        "tflops_per_rank": 0.03,
        "mfu": None,
    }


def change(delta: float, half: float) -> dict[str, Any]:
    """A paired difference from step 0."""
    low, high = delta - half, delta + half
    return {
        "iteration": 0, "delta": delta, "low": low, "high": high, "significant": low > 0 or high < 0, "items": 64,
    }  # fmt: skip


def evaluations(step: int, depth: float, noise: np.random.Generator, missing: str | None) -> list[dict[str, Any]]:
    wobble = 0.0 if step == 0 else float(noise.normal(0, 0.002))
    general, medical = 0.283 + dip(step, depth, 40, 0.01) + wobble, 0.05 + dip(step, 0, 40, 0.2) + wobble
    rows: list[dict[str, Any]] = []
    for name, accuracy, start, loss in (
        ("medical", medical, 0.05, 7.56 - 5 * (medical - 0.05)),
        ("general", general, 0.283, 6.6 - 5 * general),
    ):
        rows.append(
            {
                "validation": name, "loss": loss, "ppl": math.exp(loss), "tokens": 16384, "accuracy": accuracy,
                "loss_low": loss - 0.08, "loss_high": loss + 0.08, "accuracy_low": accuracy - 0.01,
                "accuracy_high": accuracy + 0.01, "bits_per_byte": None,
                "paired": {"loss": change(-5 * (accuracy - start), 0.01), "accuracy": change(accuracy - start, 0.004)}
                if step else None,
            }
        )  # fmt: skip
    values: dict[str, float | None] = {}
    for number, (task, base) in enumerate(TASKS.items()):
        if task == missing:
            values[task] = None
            continue
        value = base + dip(step, depth / 2, 40, 0.02 + 0.01 * number) + wobble
        values[task] = value
        delta = value - base
        paired = {
            "iteration": 0,
            "delta": delta,
            "low": delta - 0.01,
            "high": delta + 0.01,
            "significant": abs(delta) > 0.01,
        }
        rows.append(
            {
                "task": task, "suite": "medical-table1", "metric": "acc", "value": value, "low": value - 0.02,
                "high": value + 0.02, "items": 500, "higher_is_better": True, "paired": paired if step else None,
            }
        )  # fmt: skip
    known = [value for value in values.values() if value is not None]
    mean = None if missing else sum(known) / len(known)
    rows.append(
        {
            "suite": "medical-table1", "metric": "mean", "value": mean, "low": None if mean is None else mean - 0.01,
            "high": None if mean is None else mean + 0.01, "absent": [missing] if missing else [], "tasks": values,
            "paired": None,
        }
    )  # fmt: skip
    return rows


def weight_update(step: int) -> dict[str, Any]:
    layers = [
        {"layer": n, "mean_ratio": 0.02 * math.sqrt(step) * (1 + 0.4 * (5 - n) / 5 * math.exp(-step / 60)),
         "norm_ratio": 0.01 * math.sqrt(step) * (1 + 0.03 * (5 - n))}
        for n in range(6)
    ]  # fmt: skip
    groups = {"top": layers[-2:], "bottom": layers[:2]}
    sides = {
        side: {"layers": 2, **{key: sum(layer[key] for layer in own) / 2 for key in ("mean_ratio", "norm_ratio")}}
        for side, own in groups.items()
    }
    ratio = {key: sides["bottom"][f"{key}_ratio"] / sides["top"][f"{key}_ratio"] for key in ("mean", "norm")}
    return {"weight_update": layers, **sides, "ratio": ratio}


def probe(step: int) -> dict[str, Any]:
    return {
        "gradient_probe": [
            {"layer": n, "cosine": 0.4 * math.sin(step / 60 + n / 2) + 0.1, "domain_norm": 1.0, "general_norm": 1.2}
            for n in range(6)
        ]
    }


def write_run(folder: Path, rows: list[dict[str, Any]], *, seed: int = 1, steps: int = 200) -> Path:
    """A run folder with these rows, a configuration, a log and a checkpoint's state."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        f"model: {{preset: tiny, tensor_model_parallel_size: 2}}\ntrain: {{train_iters: {steps}, seed: {seed}}}\n"
    )
    (folder / "train.log").write_text(
        f"megacpt 0.1.0 | python 3.12.1\nranks: 2\n [2026-01-01] iteration        1/ {steps:7d} | consumed samples\n"
    )
    checkpoint = folder / "checkpoints" / f"iter_{steps:07d}"
    checkpoint.mkdir(parents=True)
    state = {
        "mixture": {"sources": {"medical": {"documents": 18055, "tokens": 1706124, "digest": "3f5106974a97"}}},
        "layout": {"world_size": 2, "tensor": 2},
        "versions": {"megacpt": "0.1.0", "torch": "2.14.1"},
        "identity": {"model.num_layers": 6},
    }
    (checkpoint / "megacpt.json").write_text(json.dumps(state))
    return folder
