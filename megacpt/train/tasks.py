"""Tasks while a run trains: checked before it starts, run on its schedule, paired with step 0, and never its end."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megacpt.config.tree import Config
from megacpt.errors import DiskError, UserError
from megacpt.eval.codec import Codec
from megacpt.eval.live import LiveModel
from megacpt.eval.results import Row, error_row, read_items, rows_of, write_items
from megacpt.eval.suites import GROUPS, SUITES, Selection, select
from megacpt.eval.task_data import TaskData
from megacpt.model.build import without_userbuffers
from megacpt.model.hf.source import gguf_file
from megacpt.train.live import run_codec
from megacpt.train.origin import Origin, find_tokenizer
from megacpt.train.plan import Plan

MIN_BATCH_TOKENS = 2048
"""A micro-batch of tasks has the tokens of one of training, or these."""


@dataclass(frozen=True)
class Tasks:
    """The tasks of a run; the codec is there on rank 0 alone."""

    selection: Selection
    absent: tuple[str, ...]
    data: TaskData
    limit: int | None
    codec: Codec | None
    folder: Path
    max_length: int
    batch_tokens: int

    def run(self, chunks: Sequence[torch.nn.Module], iteration: int) -> list[Row]:
        """Run all tasks, on all ranks together; rows on rank 0, none elsewhere.

        Whatever fails becomes a row of its own: a task, the pairing with step 0.

        Raises:
            DiskError: the items cannot be written.
        """
        from megacpt.eval.tasks import evaluate_tasks

        model = LiveModel(chunks, self.max_length, self.batch_tokens)
        present = [task for task in self.selection.tasks if task not in self.absent]
        with without_userbuffers(chunks):
            evaluation = evaluate_tasks(model, self.codec, present, self.data, self.limit)
        if evaluation is None:
            return []
        base_file = self.folder / items_file(0)
        rows = [error_row(task, f"{self.data.folder} holds no items of it") for task in self.absent if iteration == 0]
        try:
            base = read_items(base_file) if iteration and base_file.is_file() else None
            rows = rows_of(evaluation, self.selection, base, 0) + rows
            write_items(self.folder / items_file(iteration), evaluation)
        except DiskError:
            raise
        except Exception as error:
            rows.append(error_row("tasks", f"{type(error).__name__}: {error}"))
        return rows


def items_file(iteration: int) -> str:
    """The file of one evaluation's items."""
    return f"iter_{iteration:07d}.jsonl"


def task_data(config: Config) -> TaskData:
    """Where a run's tasks have their items.

    Raises:
        UserError: nothing says where, or the folder is not there.
    """
    place = config.eval.task_data or os.environ.get("MEGACPT_TASK_DATA")
    if place is None:
        raise UserError("eval.tasks is set, but no folder of items: set eval.task_data, or MEGACPT_TASK_DATA")
    data = TaskData(Path(place))
    data.check()
    return data


def check_task_settings(config: Config, origin: Origin | None) -> tuple[str, ...]:
    """Refuse tasks that cannot be run; returns those of the suites that have no items.

    Raises:
        UserError: lm_eval, the data or a tokenizer is absent, or a name is unknown.
    """
    names = config.eval.tasks
    if not names:
        return ()
    from megacpt.eval.tasks import check_tasks

    own = origin is not None and (find_tokenizer(origin.folder) is not None or gguf_file(origin.folder) is not None)
    if not own and config.tokenizer is None:
        raise UserError("eval.tasks is set, but tasks are text and no tokenizer is known: name it in section tokenizer")
    if own and importlib.util.find_spec("transformers") is None:
        raise UserError("eval.tasks needs transformers for the model's tokenizer; pip install 'megacpt[eval]'")
    own_names = [name for name in names if name not in (*SUITES, *GROUPS)]
    return tuple(check_tasks(select(names).tasks, task_data(config), own_names))


def build_tasks(plan: Plan, *, is_first: bool) -> Tasks | None:
    """The tasks of a planned run; None where it has none. On the first rank once the run folder is set up.

    Raises:
        UserError: the tokenizer's files are damaged.
    """
    config = plan.config
    if not config.eval.tasks:
        return None
    folder = Path(config.save.dir) / "tasks"
    codec = run_codec(config, plan.base_folder) if is_first else None
    assert codec is not None or not is_first, "check_task_settings has found a tokenizer"
    if is_first and plan.resume is None:
        # Of another run that once lived here: nothing to pair with.
        (folder / items_file(0)).unlink(missing_ok=True)
    return Tasks(
        selection=select(config.eval.tasks),
        absent=plan.absent_tasks,
        data=task_data(config),
        limit=config.eval.task_limit,
        codec=codec,
        folder=folder,
        max_length=plan.architecture.max_position_embeddings,
        batch_tokens=max(MIN_BATCH_TOKENS, config.train.micro_batch_size * config.data.seq_length),
    )
