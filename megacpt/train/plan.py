"""A run as it is known before the first process group: what it consists of, and what it does when."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megacpt.config.architecture import Architecture
from megacpt.config.tree import Config
from megacpt.data.mixture.mixture import Mixture
from megacpt.data.samples.blended import Corpus, EvalSet
from megacpt.runtime.engine import Choice
from megacpt.runtime.setup import Layout
from megacpt.train.checkpoint import TrainState
from megacpt.train.guard import Ended
from megacpt.train.memory import Setting
from megacpt.train.origin import Origin
from megacpt.train.schedule import LRSchedule


@dataclass(frozen=True)
class Vocabulary:
    """What made the tokens: size, and the tokenizer file's hash where it is known."""

    size: int
    sha256: str | None
    type: str | None = None


@dataclass(frozen=True)
class Resume:
    """The checkpoint from which this run goes on."""

    folder: Path
    state: TrainState


@dataclass(frozen=True)
class Plan:
    """A checked run: nothing below it asks whether the configuration makes sense."""

    config: Config
    layout: Layout
    architecture: Architecture
    vocabulary: Vocabulary
    mixture: Mixture
    corpora: dict[str, Corpus]
    eval_sets: dict[str, EvalSet]
    schedule: LRSchedule
    resume: Resume | None
    dtype: torch.dtype
    on_gpu: bool
    layers: Choice
    origin: Origin | None = None
    notes: tuple[str, ...] = ()
    ended: Ended | None = None
    absent_tasks: tuple[str, ...] = ()

    @property
    def setting(self) -> Setting:
        """What memory depends on."""
        return Setting(
            self.config, self.architecture, self.layout, self.dtype, on_gpu=self.on_gpu, engine=self.layers.engine
        )

    @property
    def first_iteration(self) -> int:
        """Finished iterations at the start of this process."""
        return self.resume.state.iteration if self.resume else 0

    @property
    def last_iteration(self) -> int:
        """The iteration after which the run ends; a run that the guard ended has no further one."""
        return self.mixture.steps if self.ended is None else self.first_iteration

    @property
    def base_folder(self) -> Path | None:
        """Where the run keeps the small files of the Hugging Face model that it began from; None for other runs."""
        return Path(self.config.save.dir) / "hf_base" if self.origin is not None else None

    def learning_rate(self, iteration: int) -> float:
        """The rate with which iteration 1, 2, ... updates; as in Megatron, the first uses the schedule's step 0."""
        return self.schedule.at(iteration - 1, self.mixture.steps_available, self.mixture.global_batch_size)

    def evaluates_after(self, iteration: int) -> bool:
        """Whether the named sets are evaluated once `iteration` is finished (0: before the first)."""
        settings = self.config.eval
        return bool(settings.sets) and self._is_due(iteration, settings.at, settings.every)

    def runs_tasks_after(self, iteration: int) -> bool:
        """Whether the tasks are run once `iteration` is finished."""
        settings = self.config.eval
        at = settings.at if settings.tasks_at is None else settings.tasks_at
        return bool(settings.tasks) and self._is_due(iteration, at, settings.tasks_every or settings.every)

    def _is_due(self, iteration: int, at: Sequence[int], every: int | None) -> bool:
        regular = every is not None and iteration > 0
        return iteration in at or (regular and (iteration % (every or 1) == 0 or iteration == self.last_iteration))

    @property
    def measures_weights(self) -> bool:
        """Whether the distance from the weights of iteration 0 is measured at all."""
        settings = self.config.diagnostics.weight_update
        return bool(settings.at) or settings.every is not None

    def measures_weights_after(self, iteration: int) -> bool:
        """Whether it is measured once `iteration` is finished."""
        settings = self.config.diagnostics.weight_update
        regular = settings.every is not None and (iteration % settings.every == 0 or iteration == self.last_iteration)
        return iteration in settings.at or regular

    def probes_gradients_of(self, iteration: int) -> bool:
        """Whether the gradients of the batch of `iteration` are probed before it is trained on."""
        settings = self.config.diagnostics.gradient_probe
        return iteration in settings.at or (settings.every is not None and iteration % settings.every == 0)

    @property
    def domain(self) -> tuple[str, ...]:
        """The sources that a gradient probe sets against all others."""
        named = self.config.diagnostics.gradient_probe.domain
        with_ = self.config.data.mixture.with_
        return tuple(named) or (() if with_ is None else (with_,))

    def saves_after(self, iteration: int) -> bool:
        """Whether a checkpoint is written once `iteration` is finished."""
        interval = self.config.save.interval
        regular = interval is not None and iteration % interval == 0
        return iteration == self.last_iteration or regular or self.exports_after(iteration)

    def exports_after(self, iteration: int) -> bool:
        """Whether that checkpoint is also written as a Hugging Face folder."""
        every = self.config.save.hf_every
        return every is not None and (iteration % every == 0 or iteration == self.last_iteration)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one that wrote the checkpoint."""
        return {
            **{f"model.{name}": value for name, value in asdict(self.architecture).items()},
            "precision.dtype": str(self.dtype).removeprefix("torch."),
            "tokenizer": self.vocabulary.sha256,
            "train.global_batch_size": self.config.train.global_batch_size,
            "train.freeze.top": self.config.train.freeze.top,
            "train.freeze.bottom": self.config.train.freeze.bottom,
            "data.reset_attention_mask": self.config.data.reset_attention_mask,
        }


def fingerprint(mixture: Mapping[str, Any]) -> str:
    """A short name of the sequence of samples (`Mixture.fingerprint()`), for people to compare."""
    return hashlib.sha256(json.dumps(mixture, sort_keys=True).encode()).hexdigest()[:12]
