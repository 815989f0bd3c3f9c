"""The only wiring: from a plan to a job whose parts the loop calls."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megacpt.config.load import dump_config
from megacpt.data.batches import BatchLayout, micro_batches
from megacpt.data.blended import BlendedDataset
from megacpt.errors import UserError
from megacpt.eval.validation import evaluate
from megacpt.files import disk_errors, lock, write_text
from megacpt.model.build import BuildOptions, build_chunks, freeze_layers, transformer_config
from megacpt.model.forward import Batch, run_batches, stage_reads_batches
from megacpt.model.gpt import LlamaModel
from megacpt.runtime.environment import versions
from megacpt.runtime.setup import Rank
from megacpt.train.checkpoint import (
    Beside,
    TrainState,
    load_all,
    remove_partial,
    save_checkpoint,
)
from megacpt.train.exchange import HFOutput, export_checkpoint
from megacpt.train.interchange import megatron_state
from megacpt.train.metrics import MetricsLog, mfu, perplexity
from megacpt.train.optimizer import build_optimizer, set_learning_rate, wrap_chunks
from megacpt.train.plan import Plan
from megacpt.train.start import initial_weights


@dataclass
class Progress:
    """What changes while training; everything here goes into a checkpoint.

    Attributes:
        tokens: target tokens seen by source, int64 [sources].
        former_tokens: those seen of sources that the mixture no longer has, by name.
        interval: float64 [2, sources], summed loss and tokens since the last log line.
        interval_steps: steps in that interval.
    """

    iteration: int
    tokens: torch.Tensor
    former_tokens: dict[str, int]
    interval: torch.Tensor
    interval_steps: int = 0
    interval_began: float = field(default_factory=time.perf_counter)

    @property
    def consumed_tokens(self) -> int:
        """Target tokens seen by the whole run."""
        return int(self.tokens.sum()) + sum(self.former_tokens.values())


@dataclass
class Job:
    """A run in this process."""

    plan: Plan
    rank: Rank
    chunks: list[LlamaModel]
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    batch_layout: BatchLayout
    batches: Iterator[Batch] | None
    log: MetricsLog | None
    lock: IO[str] | None
    progress: Progress

    @property
    def sources(self) -> list[str]:
        """Names of the training sources, in the order of their numbers."""
        return [source.name for source in self.plan.mixture.sources]

    def next_batch(self) -> list[Batch]:
        """This rank's micro-batches of the next step; empty ones on a pipeline stage that reads none."""
        count = self.batch_layout.micro_batches
        return [{}] * count if self.batches is None else [next(self.batches) for _ in range(count)]

    def step(self, batches: list[Batch], lr: float) -> float:
        """Forward, backward, clip, update. Returns the global gradient norm before clipping.

        Raises:
            UserError: the loss or the norm is not finite; checkpoints on disk are from before that.
        """
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        shape = (self.batch_layout.micro_batch_size, self.plan.config.data.seq_length)
        sums = run_batches(self.wrapped, batches, len(self.sources), shape, train=True).cpu()
        progress = self.progress
        progress.iteration += 1
        self._check_finite("loss", float(sums[0].sum()))
        set_learning_rate(self.optimizer, lr)
        _, grad_norm, _ = self.optimizer.step()
        self._check_finite("gradient norm", float(grad_norm))
        progress.interval += sums
        progress.interval_steps += 1
        progress.tokens += sums[1].long()
        return float(grad_norm)

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"iteration {self.progress.iteration}: the {what} is {value}; resume from the last checkpoint with a "
                "lower optimizer.lr or a longer warm-up, or look at the data of this step"
            )

    def log_step(self, lr: float, grad_norm: float) -> None:
        """Write a training row at the end of a log interval."""
        progress, settings = self.progress, self.plan.config.train
        if progress.iteration % settings.log_interval and progress.iteration != self.plan.last_iteration:
            return
        if self.log is not None:
            self.log.train(self._training_row(lr, grad_norm))
        progress.interval.zero_()
        progress.interval_steps = 0
        progress.interval_began = time.perf_counter()

    def _training_row(self, lr: float, grad_norm: float) -> dict[str, Any]:
        progress, mixture = self.progress, self.plan.mixture
        loss, tokens = progress.interval.tolist()
        seconds = time.perf_counter() - progress.interval_began
        rate = sum(tokens) / seconds
        flops = self.plan.architecture.flops_per_token(mixture.seq_length)
        tflops = rate * flops / self.rank.world_size / 1e12
        consumed = progress.iteration * mixture.global_batch_size
        device = torch.cuda.get_device_name() if self.rank.device.type == "cuda" else "CPU"
        return {
            "iteration": progress.iteration,
            "consumed_samples": consumed,
            "consumed_tokens": progress.consumed_tokens,
            "lm_loss": sum(loss) / sum(tokens),
            "grad_norm": grad_norm,
            "learning_rate": lr,
            "loss_by_source": {n: x / t for n, x, t in zip(self.sources, loss, tokens, strict=True) if t},
            "tokens_by_source": {n: int(t) for n, t in zip(self.sources, tokens, strict=True)},
            "epochs_by_source": {n: float(e) for n, e in mixture.epochs(consumed).items()},
            "global_batch_size": mixture.global_batch_size,
            "skipped_iterations": 0,
            "nan_iterations": 0,
            "iteration_ms": 1000 * seconds / progress.interval_steps,
            "tokens_per_second": rate,
            "tflops_per_rank": tflops,
            "mfu": mfu(tflops, device),
        }

    def evaluate(self) -> None:
        """Validate on every named set and log the rows; the time it takes is not the training steps'."""
        began = time.perf_counter()
        documents = self.plan.config.data.reset_attention_mask
        for name, eval_set in self.plan.eval_sets.items():
            result = evaluate(
                self.wrapped, eval_set, self.batch_layout, self.plan.config.data.seq_length, documents=documents
            )
            if self.log is not None:
                consumed = self.progress.iteration * self.plan.mixture.global_batch_size
                self.log.validation(
                    {
                        "iteration": self.progress.iteration,
                        "consumed_samples": consumed,
                        "consumed_tokens": self.progress.consumed_tokens,
                        "validation": name,
                        "loss": result.loss,
                        "ppl": perplexity(result.loss),
                        "tokens": result.tokens,
                    }
                )
        self.progress.interval_began += time.perf_counter() - began

    def save(self) -> None:
        """Write a checkpoint of now."""
        began = time.perf_counter()
        root = Path(self.plan.config.save.dir) / "checkpoints"
        beside = Beside(
            dump_config(self.plan.config),
            megatron_state(self.plan, self.progress.iteration),
            _base_folder(self.plan),
        )
        keep_last = self.plan.config.save.keep_last
        folder = save_checkpoint(root, self._state(), self.chunks, self.optimizer, beside, keep_last)
        if self.plan.exports_after(self.progress.iteration):
            self._export(folder)
        seconds = time.perf_counter() - began
        self.progress.interval_began += seconds
        if self.log is not None:
            self.log.say(f" saved {folder} in {seconds:.1f} s")

    def _export(self, checkpoint: Path) -> None:
        folder = Path(self.plan.config.save.dir) / "hf" / checkpoint.name
        if folder.exists():
            return  # written before the run was resumed
        export_checkpoint(checkpoint, HFOutput(folder), lambda count: None)
        if self.log is not None:
            self.log.say(f" exported {folder}")

    def _state(self) -> TrainState:
        progress, mixture, layout = self.progress, self.plan.mixture, self.plan.layout
        consumed = progress.iteration * mixture.global_batch_size
        return TrainState(
            iteration=progress.iteration,
            consumed_samples=consumed,
            samples_by_source=mixture.consumed(consumed),
            tokens_by_source=progress.former_tokens | dict(zip(self.sources, progress.tokens.tolist(), strict=True)),
            interval={"sums": progress.interval.tolist(), "steps": progress.interval_steps},
            mixture=mixture.fingerprint(),
            identity=self.plan.identity(),
            layout={
                "world_size": layout.world_size,
                "tensor": layout.tensor,
                "pipeline": layout.pipeline,
                "virtual": layout.virtual,
                "context": layout.context,
                "threads": self.rank.threads,
            },
            versions=versions(),
        )


def build_job(plan: Plan, rank: Rank) -> Job:
    """Build the model, load or draw its weights, wrap it, build the optimizer, open the data and the log.

    Raises:
        UserError: a checkpoint does not fit, or the run folder cannot be written.
    """
    config = plan.config
    options = BuildOptions(plan.dtype, config.data.reset_position_ids)
    chunks = build_chunks(
        plan.architecture, config.model, transformer_config(plan.architecture, config.model, options), options
    )
    verdict = initial_weights(plan, chunks) if plan.resume is None else None
    freeze_layers(chunks, config.train.freeze)
    wrapped = wrap_chunks(chunks, config.optimizer, config.precision)
    optimizer = build_optimizer(wrapped, config.optimizer, plan.dtype)
    if plan.resume is not None:
        load_all(plan.resume.folder, chunks, optimizer, plan.resume.state.iteration)
    folder = Path(config.save.dir)
    held = lock(folder / ".lock", f"the run folder {folder}") if rank.is_first else None
    data_rank = parallel_state.get_data_parallel_rank()
    batch_layout = BatchLayout(
        config.train.global_batch_size, config.train.micro_batch_size, data_rank, plan.layout.data
    )
    log = _open_log(plan) if rank.is_first else None
    if log is not None and verdict is not None:
        log.say(verdict)
    return Job(
        plan=plan,
        rank=rank,
        chunks=chunks,
        wrapped=wrapped,
        optimizer=optimizer,
        batch_layout=batch_layout,
        batches=_training_batches(plan, batch_layout),
        log=log,
        lock=held,
        progress=_progress(plan),
    )


def _base_folder(plan: Plan) -> Path | None:
    """Where the run keeps the small files of the Hugging Face model that it began from."""
    return Path(plan.config.save.dir) / "hf_base" if plan.origin is not None else None


def _training_batches(plan: Plan, batch_layout: BatchLayout) -> Iterator[Batch] | None:
    documents = plan.config.data.reset_attention_mask
    if not stage_reads_batches(documents):
        return None
    dataset = BlendedDataset(plan.mixture, plan.datasets, plan.architecture.vocab_size)
    size = plan.mixture.global_batch_size
    span = range(plan.first_iteration * size, plan.last_iteration * size)
    return micro_batches(dataset, batch_layout, span, plan.config.data.num_workers, documents)


def _progress(plan: Plan) -> Progress:
    names = [source.name for source in plan.mixture.sources]
    if plan.resume is None:
        tokens = torch.zeros(len(names), dtype=torch.long)
        return Progress(0, tokens, {}, torch.zeros(2, len(names), dtype=torch.float64))
    state = plan.resume.state
    same_sources = list(state.mixture["sources"]) == names
    interval = (
        torch.tensor(state.interval["sums"], dtype=torch.float64)
        if same_sources
        else torch.zeros(2, len(names)).double()
    )
    return Progress(
        iteration=state.iteration,
        tokens=torch.tensor([state.tokens_by_source.get(name, 0) for name in names]),
        former_tokens={name: count for name, count in state.tokens_by_source.items() if name not in names},
        interval=interval,
        interval_steps=state.interval["steps"] if same_sources else 0,
    )


def _open_log(plan: Plan) -> MetricsLog:
    config, folder = plan.config, Path(plan.config.save.dir)
    with disk_errors(folder):
        # First, for what a killed save left may have filled the disk.
        remove_partial(folder / "checkpoints")
        write_text(folder / "config.yaml", dump_config(config))
        base = _base_folder(plan)
        if base is not None and plan.origin is not None:
            plan.origin.write(base, plan.architecture)
        return MetricsLog(
            folder,
            plan.first_iteration,
            plan.last_iteration,
            tensorboard=config.logging.tensorboard,
            wandb_project=config.logging.wandb_project,
        )
