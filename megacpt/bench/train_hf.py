"""Hugging Face Trainer on the same weights, batches and optimizer: `python -m megacpt.bench.train_hf CONFIG RESULT`.

With --compile, its model goes through torch.compile. With --make SHAPE FOLDER DTYPE it writes the model that all start
from. Attention is torch's scaled_dot_product_attention and AdamW torch's fused one: the best that Trainer has without
another package.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from megacpt.bench.contestant import Result, Stopwatch
from megacpt.config.architecture import Architecture
from megacpt.config.load import load_config
from megacpt.config.tree import Config
from megacpt.data.samples.batches import collate
from megacpt.data.samples.blended import BlendedDataset
from megacpt.runtime.compiler import load_megatron_core


def make_model(shape: Path, folder: Path, dtype: str) -> None:
    """Write a Llama of this shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megacpt.model.hf.config_json import config_for
    from megacpt.model.hf.families import LLAMA

    torch.manual_seed(0)
    architecture = Architecture(**yaml.safe_load(shape.read_text(encoding="utf-8")))
    config = LlamaConfig(**config_for(architecture, None, LLAMA))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16 if dtype == "bf16" else torch.float32).save_pretrained(folder)


def samples_of(config: Config) -> list[dict[str, torch.Tensor]]:
    """The samples of all steps, in the trainer's order, as Trainer's collator takes them."""
    from megacpt.train.planning import make_plan

    plan = make_plan(config, 1, on_gpu=torch.cuda.is_available())
    dataset = BlendedDataset(plan.mixture, plan.corpora, plan.architecture.vocab_size)
    dataset.prepare(0)
    rows = []
    for number in range(plan.last_iteration * plan.mixture.global_batch_size):
        batch = collate([dataset.sample(number)])
        labels = batch["labels"][0]
        # Trainer would shift labels itself, and so train on one token less in every sequence.
        rows.append({"input_ids": batch["tokens"][0], "labels": labels, "shift_labels": labels})
    return rows


def train(config: Config, result: Result, compiled: bool) -> None:
    """Train the plan's steps."""
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    watch = Stopwatch()

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            watch.lap()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            result.step_took(watch.lap())

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                result.losses.append(logs["loss"])

    bf16, settings, optimizer = config.precision.dtype == "bf16", config.train, config.optimizer
    assert settings.train_iters is not None
    model = AutoModelForCausalLM.from_pretrained(config.init.hf, dtype=torch.float32, attn_implementation="sdpa")
    arguments = TrainingArguments(
        output_dir=str(Path(config.save.dir).with_name("trainer")),
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.global_batch_size // settings.micro_batch_size,
        max_steps=settings.train_iters,
        learning_rate=optimizer.lr,
        lr_scheduler_type="constant",
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_epsilon=optimizer.adam_eps,
        max_grad_norm=optimizer.clip_grad,
        optim="adamw_torch_fused",
        bf16=bf16,
        torch_compile=compiled,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )
    Trainer(model=model, args=arguments, train_dataset=samples_of(config), callbacks=[Timer()]).train()


def main() -> None:
    """Train, or make the model."""
    load_megatron_core()
    if sys.argv[1] == "--make":
        make_model(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
        return
    config_path, result_path, *flags = sys.argv[1:]
    config = load_config(config_path, [])
    torch.set_num_threads(config.runtime.threads or len(os.sched_getaffinity(0)))
    result = Result()
    train(config, result, "--compile" in flags)
    result.write(Path(result_path))


if __name__ == "__main__":
    main()
