"""A run in this process: the parts that the loop calls."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megacpt.config.load import dump_config
from megacpt.data.samples.batches import BatchLayout
from megacpt.data.samples.blended import EvalSet
from megacpt.errors import UserError
from megacpt.eval.results import error_row
from megacpt.eval.validation import EvaluationFailed, Validation, evaluate
from megacpt.model.forward import Batch, run_batches
from megacpt.model.gpt import LanguageModel
from megacpt.model.hf.unfinished import Report
from megacpt.runtime.environment import versions
from megacpt.runtime.setup import Rank
from megacpt.train.checkpoint import Beside, Kept, TrainState, iteration_folder, point_to, save_checkpoint
from megacpt.train.exchange import HFOutput, export_checkpoint
from megacpt.train.gradient_probe import Probe
from megacpt.train.guard import Ended, Verdict, Watch, record_end
from megacpt.train.interchange import megatron_state
from megacpt.train.metrics import MetricsLog, mfu, validation_row
from megacpt.train.optimizer import set_learning_rate
from megacpt.train.plan import Plan
from megacpt.train.progress import Progress
from megacpt.train.rows import Row
from megacpt.train.shares import gather_parameters
from megacpt.train.step_zero import StepZero
from megacpt.train.tasks import Tasks
from megacpt.train.weight_update import BaseWeights, weight_update


@dataclass
class Job:
    """A run in this process.

    Attributes:
        watch: what evaluations decide, on the first rank.
        ended: how the guard ended the run, now or earlier.
        base: the weights of iteration 0, where the distance from them is measured.
        step_zero: what validations are paired with, on the first rank.
    """

    plan: Plan
    rank: Rank
    chunks: list[LanguageModel]
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    batch_layout: BatchLayout
    batches: Iterator[Batch] | None
    log: MetricsLog | None
    lock: IO[str] | None
    progress: Progress
    watch: Watch | None = None
    ended: Ended | None = None
    base: BaseWeights | None = None
    tasks: Tasks | None = None
    step_zero: StepZero | None = None

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

    def probe(self, batches: list[Batch]) -> None:
        """Compare the gradients of the coming step's domain and other samples, where that is due."""
        iteration = self.progress.iteration + 1
        if not self.plan.probes_gradients_of(iteration):
            return
        began = time.perf_counter()
        domain = frozenset(self.sources.index(name) for name in self.plan.domain)
        shape = (self.batch_layout.micro_batch_size, self.plan.config.data.seq_length)
        probe = Probe(self.chunks, self.wrapped, self.optimizer, len(self.sources), domain, shape)
        found = probe.measure(batches)
        seconds = time.perf_counter() - began
        if isinstance(found, str):
            self._say(f" no gradient probe of iteration {iteration}: {found}")
        else:
            # Numbered like the step to come, so that a run that resumes in between has it once.
            self._report(found | {"iteration": iteration, "seconds": seconds})
        self.progress.interval_began += time.perf_counter() - began

    def measure(self) -> None:
        """Measure how far weights have moved, where that is due; its time is not the training steps'."""
        if self.base is None or not self.plan.measures_weights_after(self.progress.iteration):
            return
        began = time.perf_counter()
        gather_parameters(self.wrapped)
        row = weight_update(self.base, self.plan.config.diagnostics.weight_update.layers)
        seconds = time.perf_counter() - began
        self._report(row | {"seconds": seconds})
        self.progress.interval_began += time.perf_counter() - began

    def evaluate(self) -> Verdict:
        """Do the evaluations that are due, log their rows, and judge them; their time is not the training steps'."""
        iteration, began = self.progress.iteration, time.perf_counter()
        validates, tasks = self.plan.evaluates_after(iteration), self.plan.runs_tasks_after(iteration)
        if validates:
            self._validate()
        if tasks:
            assert self.tasks is not None, "the plan runs tasks"
            for row in self.tasks.run(self.wrapped, iteration):
                if self.log is not None:
                    self.log.evaluation(self._here() | row)
        verdict = self._judge() if validates or tasks else Verdict()
        self.progress.interval_began += time.perf_counter() - began
        return verdict

    def _validate(self) -> None:
        config, iteration = self.plan.config, self.progress.iteration
        finite: dict[str, tuple[EvalSet, Validation]] = {}
        for name, eval_set in self.plan.eval_sets.items():
            try:
                result = evaluate(
                    self.wrapped,
                    eval_set,
                    self.batch_layout,
                    config.data.seq_length,
                    documents=config.data.reset_attention_mask,
                )
            except EvaluationFailed as error:
                self._report(error_row(name, str(error)))
                continue
            if self.log is None or self.step_zero is None:
                continue
            row = validation_row(name, eval_set, result, self.step_zero.base(name, eval_set) if iteration else None)
            if "validation" in row:
                finite[name] = (eval_set, result)
                self.log.validation(self._here() | row)
            else:
                self._report(row)
        if iteration == 0 and self.step_zero is not None:
            self.step_zero.keep(finite)

    def _judge(self) -> Verdict:
        if self.plan.config.guard is None and self.plan.config.save.best is None:
            return Verdict()
        box = [self.watch.judge(self.progress.iteration) if self.watch is not None else None]
        dist.broadcast_object_list(box, src=0)
        (verdict,) = box
        assert verdict is not None
        if verdict.drop is not None:
            self._report(verdict.drop.row())
        return verdict

    def _here(self) -> Row:
        """The fields that every row begins with."""
        return {
            "iteration": self.progress.iteration,
            "consumed_samples": self.progress.iteration * self.plan.mixture.global_batch_size,
            "consumed_tokens": self.progress.consumed_tokens,
        }

    def _report(self, row: Row) -> None:
        if self.log is not None:
            self.log.diagnostic(self._here() | row)

    def save(self) -> None:
        """Write a checkpoint of now."""
        began = time.perf_counter()
        root = Path(self.plan.config.save.dir) / "checkpoints"
        beside = Beside(
            dump_config(self.plan.config),
            megatron_state(self.plan, self.progress.iteration),
            self.plan.base_folder,
        )
        best = self.watch.best if self.watch is not None else None
        gather_parameters(self.wrapped)
        kept = Kept(self.plan.config.save.keep_last, best and best.iteration)
        folder = save_checkpoint(root, self._state(), self.chunks, self.optimizer, beside, kept)
        if self.plan.exports_after(self.progress.iteration):
            self._export(folder)
        seconds = time.perf_counter() - began
        self.progress.interval_began += seconds
        self._say(f" saved {folder} in {seconds:.1f} s")

    def end(self, verdict: Verdict) -> None:
        """End the run as the guard says, on a new checkpoint or on the best there is."""
        assert verdict.drop is not None
        assert verdict.ends_on is not None
        folder, iteration = Path(self.plan.config.save.dir), self.progress.iteration
        self.ended = Ended(iteration, verdict.ends_on, verdict.drop)
        # First: a run killed before it has the checkpoint goes on from another, to which the record does not apply.
        if self.log is not None:
            record_end(folder, self.ended)
        if verdict.ends_on == iteration:
            self.save()
        else:
            point_to(folder / "checkpoints", verdict.ends_on)
        if self.plan.config.save.hf_every is not None:
            self._export(iteration_folder(folder / "checkpoints", verdict.ends_on))

    def finish_export(self) -> None:
        """Export the checkpoint that this run resumes from, where the run was stopped before it had done so."""
        resume, began = self.plan.resume, time.perf_counter()
        if resume is not None and self.plan.exports_after(resume.state.iteration):
            self._export(resume.folder)
        self.progress.interval_began += time.perf_counter() - began

    def _export(self, checkpoint: Path) -> None:
        folder = Path(self.plan.config.save.dir) / "hf" / checkpoint.name
        if folder.exists():
            return  # written before the run was resumed
        export_checkpoint(checkpoint, HFOutput(folder), Report(resumed=lambda _, sentence: self._say(f" {sentence}")))
        self._say(f" exported {folder}")

    def _say(self, sentence: str) -> None:
        if self.log is not None:
            self.log.say(sentence)

    def _state(self) -> TrainState:
        progress, mixture, layout = self.progress, self.plan.mixture, self.plan.layout
        consumed = progress.iteration * mixture.global_batch_size
        at = mixture.at(consumed)
        return TrainState(
            iteration=progress.iteration,
            consumed_samples=consumed,
            samples_by_source=dict(at.consumed),
            position_by_source=dict(at.position or {}),
            fixed_by_source=dict(at.fixed),
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
                "transformer_impl": self.plan.layers.transformer_impl,
            },
            versions=versions(),
        )
