"""lm_eval's tasks on the live model: their prompts and metrics, our items and our forward passes.

Imported only where tasks are run: it needs lm_eval, and says so where that is absent.
"""

import io
import logging
import os
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megacpt.errors import UserError
from megacpt.eval.codec import Codec
from megacpt.eval.harness import MegacptLM
from megacpt.eval.live import LiveModel
from megacpt.eval.scoring import ScoringFailed
from megacpt.eval.statistics import Measure
from megacpt.eval.suites import MMLU_MEDICAL, unknown_task
from megacpt.eval.task_data import MMLU, TaskData
from megacpt.runtime.setup import RankLost

WHERE = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "medmcqa": "medmcqa/medmcqa.yaml",
    "medqa_4options": "medqa/medqa.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "pubmedqa": "pubmedqa/pubmedqa.yaml",
    "race": "race/race.yaml",
    "sciq": "sciq/sciq.yaml",
    "wikitext": "wikitext/wikitext.yaml",
    "winogrande": "winogrande/default.yaml",
} | {task: f"mmlu/default/{task}.yaml" for task in MMLU_MEDICAL}
"""Where lm_eval keeps the tasks of the suites: its index of all 13,000 takes ten seconds to build."""
AGGREGATIONS = {
    "mean": "mean",
    "perplexity": "perplexity",
    "weighted_perplexity": "perplexity",
    "bits_per_byte": "bits",
}
"""lm_eval's aggregations that are a function of a ratio of sums, and that function (`statistics.TRANSFORMS`)."""
DEFAULT_FILTER = "none"

Item = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """One metric of a task; without `measure` it cannot be resampled, and has a value only."""

    value: float
    higher_is_better: bool
    measure: Measure | None


@dataclass(frozen=True)
class TaskResult:
    """What a task gave: its metrics, and a record of each item."""

    task: str
    metrics: dict[str, Metric]
    items: list[Item]


@dataclass
class Evaluation:
    """Results by task, and for tasks that gave none the sentence that says why."""

    results: dict[str, TaskResult] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def evaluate_tasks(
    model: LiveModel, codec: Codec | None, tasks: Sequence[str], data: TaskData, limit: int | None
) -> Evaluation | None:
    """Run tasks one after the other on all ranks together; the evaluation on rank 0, None elsewhere.

    Only rank 0 needs the codec. Whatever a task raises is that task's failure; the next one is run.

    Raises:
        RankLost: a forward pass raised on this rank alone, and others wait for it there.
    """
    evaluation = Evaluation()

    def work() -> Evaluation:
        assert codec is not None, "rank 0 has one"
        lm = MegacptLM(model, codec)
        for name in tasks:
            try:
                evaluation.results[name] = run_task(lm, name, data, limit)
            except RankLost:
                raise
            except (UserError, ScoringFailed) as error:
                evaluation.failures[name] = str(error)
            except Exception as error:
                evaluation.failures[name] = f"{type(error).__name__}: {error}"
        return evaluation

    return model.lead(work)


def run_task(lm: Any, name: str, data: TaskData, limit: int | None) -> TaskResult:
    """One task, zero-shot, with any lm_eval model.

    Args:
        limit: its first so many items; None: all.

    Raises:
        UserError: the task is unknown, or its items are absent or damaged.
    """
    _quiet()
    from lm_eval.evaluator import evaluate

    task = _build(name, data)
    with redirect_stderr(io.StringIO()):  # a progress bar over the making of prompts, which cannot be turned off
        found = evaluate(lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0, log_samples=True)
    assert found is not None
    samples = found["samples"][name]
    metrics = {}
    for metric in task.aggregation():
        for kind in dict.fromkeys(sample["filter"] for sample in samples):
            chosen = [sample for sample in samples if sample["filter"] == kind and metric in sample]
            if chosen:
                label = metric if kind == DEFAULT_FILTER else f"{metric},{kind}"
                metrics[label] = Metric(
                    value=float(found["results"][name][f"{metric},{kind}"]),
                    higher_is_better=bool(task.higher_is_better()[metric]),
                    measure=_measure(f"{name}/{label}", chosen, metric, task.aggregation()[metric].__name__),
                )
    return TaskResult(name, metrics, [_record(name, sample, list(task.aggregation())) for sample in samples])


def find_task(name: str, data: TaskData) -> Path:
    """The YAML file of a task: of the folder of task data, else of lm_eval.

    Raises:
        UserError: there is none of that name; names the nearest.
    """
    import lm_eval.tasks

    own = {path.stem: path for path in sorted(data.folder.glob("*.yaml"))}
    if name in own:
        return own[name]
    root = Path(lm_eval.tasks.__file__).parent
    place = root / WHERE.get(name, f"mmlu/default/{name}.yaml" if name.startswith(MMLU) else "absent")
    if place.is_file():
        return place
    index = lm_eval.tasks.TaskManager().task_index
    entry = index.get(name)
    if entry is None:
        raise unknown_task(name, [*own, *index])
    if entry.yaml_path is None or "task" not in (entry.cfg or {}):
        raise UserError(f"{name}: is no single YAML task of lm_eval, but a group or a program; name its tasks")
    return Path(entry.yaml_path)


def check_tasks(names: Sequence[str], data: TaskData, named: Sequence[str]) -> list[str]:
    """Which tasks have no items; refuse those that cannot be meant.

    Args:
        named: tasks asked for by their own name, not by a suite's: these have to be there.

    Raises:
        UserError: the folder or a named task's items are absent, or a name is unknown.
    """
    data.check()
    absent = []
    for name in names:
        place = find_task(name, data)
        if data.find(name) is None and place.parent != data.folder:
            if name in named:
                data.items(name)
            absent.append(name)
    return absent


def _build(name: str, data: TaskData) -> Any:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    place = find_task(name, data)
    config = {k: v for k, v in load_yaml(place).items() if k not in ("tag", "group", "task_list", "task_alias")}
    if data.find(name) is None and place.parent == data.folder:
        return ConfigurableTask(config=config)
    items = data.items(name)

    def dataset(**_: Any) -> Any:
        import datasets

        datasets.disable_progress_bars()
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(items)})

    ours: dict[str, Any] = {
        "custom_dataset": dataset,
        "test_split": "test",
        "validation_split": None,
        "training_split": None,
        "fewshot_split": None,
        "fewshot_config": None,
        "num_fewshot": 0,
    }
    return ConfigurableTask(config=config | ours)


def _quiet() -> None:
    """No look at the network, and none of lm_eval's and datasets' notes on what is as intended here."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ.setdefault(name, "1")
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _measure(name: str, samples: Sequence[Item], metric: str, aggregation: str) -> Measure | None:
    if aggregation not in AGGREGATIONS:
        return None
    pairs = np.array([_ratio(sample[metric]) for sample in samples], dtype=np.float64)
    return Measure(name, tuple(map(_key, samples)), pairs[:, 0], pairs[:, 1], AGGREGATIONS[aggregation])


def _ratio(value: Any) -> tuple[float, float]:
    return (float(value[0]), float(value[1])) if isinstance(value, tuple | list) else (float(value), 1.0)


def _key(sample: Item) -> str:
    """The same for the same item at the same place of the task."""
    return f"{sample['doc_id']}:{sample['doc_hash'][:16]}"


def _record(task: str, sample: Item, metrics: Sequence[str]) -> Item:
    """One line of the items' file."""
    answers = [response[0] for response in sample["resps"]]
    scored = all(isinstance(answer, tuple) for answer in answers)
    record: Item = {"task": task, "item": _key(sample)}
    if sample["filter"] != DEFAULT_FILTER:
        record["filter"] = sample["filter"]
    record["metrics"] = {metric: _plain(sample[metric]) for metric in metrics if metric in sample}
    record["target"] = _plain(sample["target"])
    if scored:
        return record | {
            "loglikelihoods": [float(logprob) for logprob, _ in answers],
            "greedy": [bool(greedy) for _, greedy in answers],
        }
    return record | {"responses": [_plain(answer) for answer in answers]}


def _plain(value: Any) -> Any:
    """As JSON holds it."""
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, str | int | float | bool | None) else str(value)
