"""Where a run's numbers go: metrics.jsonl (the truth), Megatron's log line, TensorBoard and W&B (made from it)."""

import json
import math
import shutil
import sys
from collections.abc import Iterator
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from megacpt.data.samples.blended import EvalSet
from megacpt.eval.results import Base, error_row, line_of, paired_row
from megacpt.eval.statistics import estimate
from megacpt.eval.validation import Validation, bits_per_byte
from megacpt.files import disk_errors, write_text
from megacpt.train.rows import Row, diagnostic_line, diagnostic_scalars, is_evaluation

PEAK_BF16_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0, "B200": 2250.0}
"""Dense bf16 datasheet peaks, for MFU; a device that is not here gets none."""


def perplexity(loss: float) -> float:
    """exp(loss), with Megatron's cap at exp(20)."""
    return math.exp(min(20.0, loss))


def read_rows(path: Path) -> Iterator[Row]:
    """The whole rows of a metrics file; a last line cut off by a kill is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def train_line(row: Row, total: int) -> str:
    """Megatron's log line of a training row, with tokens/s and, where the device's peak is known, MFU."""
    parts = [
        f" [{datetime.now():%Y-%m-%d %H:%M:%S.%f}] iteration {row['iteration']:8d}/{total:8d}",
        f"consumed samples: {row['consumed_samples']:12d}",
        f"elapsed time per iteration (ms): {row['iteration_ms']:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {row['tflops_per_rank']:.1f}",
        f"tokens/s: {row['tokens_per_second']:.0f}",
    ]
    if row.get("mfu") is not None:
        parts.append(f"MFU: {row['mfu']:.1%}")
    parts += [
        f"learning rate: {row['learning_rate']:.6E}",
        f"global batch size: {row['global_batch_size']:5d}",
        f"lm loss: {row['lm_loss']:.6E}",
        *(
            f"{name} loss: {loss:.6E}"
            for name, loss in row["loss_by_source"].items()
            if len(row["tokens_by_source"]) > 1
        ),
        "loss scale: 1.0",
        f"grad norm: {row['grad_norm']:.3f}",
        f"number of skipped iterations: {row['skipped_iterations']:3d}",
        f"number of nan iterations: {row['nan_iterations']:3d}",
    ]
    return " | ".join(parts) + " |"


def validation_row(name: str, eval_set: EvalSet, result: Validation, base: Base | None = None) -> Row:
    """The row of a validation, or of its failure where the loss is not finite; without the common fields.

    Args:
        base: the samples of the same set at step 0, to pair with.
    """
    if not math.isfinite(result.loss):
        return error_row(name, f"the loss is {result.loss}")
    measures = result.measures()
    loss, accuracy = estimate([measures["loss"]]), estimate([measures["accuracy"]])
    paired = {measure: paired_row([values], base, 0) for measure, values in measures.items()}
    return {
        "validation": name,
        "loss": result.loss,
        "ppl": perplexity(result.loss),
        "tokens": result.tokens,
        "accuracy": result.accuracy,
        "loss_low": loss.low,
        "loss_high": loss.high,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "bits_per_byte": bits_per_byte(result.loss, eval_set),
        "paired": None if base is None else paired,
    }


def validation_line(row: Row) -> str:
    """Megatron's validation line of a validation row."""
    return (
        f" validation-{row['validation']} loss at iteration {row['iteration']} | lm loss value: {row['loss']:.6E} | "
        f"lm loss PPL: {row['ppl']:.6E} | next-token accuracy: {row['accuracy']:.6E} | "
    )


def summary_lines(rows: list[Row]) -> list[str]:
    """What each named set's loss and accuracy did: first, highest, lowest and last value, and at which iteration."""
    names = list(dict.fromkeys(row["validation"] for row in rows))
    width, value_of = max(map(len, names), default=0), itemgetter(0)
    lines = []
    for metric in ("loss", "accuracy"):
        for name in names:
            points = [(r[metric], r["iteration"]) for r in rows if r["validation"] == name and metric in r]
            if not points:
                continue
            highest, lowest = max(points, key=value_of), min(points, key=value_of)
            marks = {"first": points[0], "highest": highest, "lowest": lowest, "last": points[-1]}
            told = ", ".join(f"{mark} {value:.4f} (iteration {at:,})" for mark, (value, at) in marks.items())
            lines.append(f"  validation {metric} of {name:<{width}}: {told}")
    return lines


def scalars(row: Row) -> dict[str, float]:
    """TensorBoard's tags for a row, in Megatron's names; those with ` vs samples` are drawn over samples."""
    if "validation" in row:
        tag, accuracy = f"lm loss validation-{row['validation']}", f"accuracy validation-{row['validation']}"
        values = {tag: row["loss"], f"{tag} ppl": row["ppl"]}
        values |= {accuracy: row["accuracy"]} if "accuracy" in row else {}
        return values | {f"{name} vs samples": value for name, value in values.items()}
    if "task" in row or "suite" in row:
        name = f"tasks/{row['task']}/{row['metric']}" if "task" in row else f"suites/{row['suite']}"
        return {} if row["value"] is None else {name: row["value"]}
    if "lm_loss" not in row:
        return diagnostic_scalars(row)
    values = {
        "lm loss": row["lm_loss"],
        "lm loss vs samples": row["lm_loss"],
        "learning-rate": row["learning_rate"],
        "learning-rate vs samples": row["learning_rate"],
        "batch-size": row["global_batch_size"],
        "grad-norm": row["grad_norm"],
        "grad-norm vs samples": row["grad_norm"],
        "loss-scale": 1.0,
        "iteration-time": row["iteration_ms"] / 1000,
        "throughput": row["tflops_per_rank"],
        "tokens-per-second": row["tokens_per_second"],
    }
    return values | {f"lm loss {name}": loss for name, loss in row["loss_by_source"].items()}


class MetricsLog:
    """The run's log on its first rank.

    On start, everything after `iteration` is dropped from metrics.jsonl, and TensorBoard's files are written anew from
    what stays, so that a resumed run leaves no trace of steps that were lost.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, iteration: int, total: int, *, tensorboard: bool, wandb_project: str | None
    ) -> None:
        self.total = total
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_rows(self.path) if row["iteration"] <= iteration] if iteration else []
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._metrics = open(self.path, "a", encoding="utf-8")  # noqa: SIM115, closed by close()
        self._text = open(folder / "train.log", "a", encoding="utf-8")  # noqa: SIM115
        self._tensorboard = _summary_writer(folder / "tensorboard") if tensorboard else None
        self._wandb = _wandb_run(wandb_project, folder) if wandb_project else None
        self.evaluations = [row for row in kept if is_evaluation(row)]
        for row in kept:
            self._draw(row)

    def say(self, text: str) -> None:
        """A line for people: terminal and train.log."""
        for stream in (sys.stdout, self._text):
            print(text, file=stream, flush=True)

    def train(self, row: Row) -> None:
        """Log a training row."""
        self._write(row)
        self.say(train_line(row, self.total))

    def validation(self, row: Row) -> None:
        """Log a validation row."""
        self._write(row)
        self.say(validation_line(row))

    def evaluation(self, row: Row) -> None:
        """Log a row of a task, of a suite, or of one that failed."""
        self._write(row)
        self.say(f" iteration {row['iteration']} | {line_of(row)}")

    def diagnostic(self, row: Row) -> None:
        """Log a row of `megacpt.train.rows`: a failed evaluation, a diagnostic, the guard."""
        self._write(row)
        self.say(diagnostic_line(row))

    def summary(self, ended: str | None = None) -> None:
        """Say what the validations did, how the run ended (None: as planned) and where everything is."""
        for line in summary_lines([row for row in self.evaluations if "validation" in row]):
            self.say(line)
        ended = ended or f"finished after iteration {self.total:,}"
        self.say(f"{ended}; numbers in {self.path}, checkpoints beside it")

    def _write(self, row: Row) -> None:
        if is_evaluation(row):
            self.evaluations.append(row)
        with disk_errors(self.path):
            self._metrics.write(json.dumps(row) + "\n")
            self._metrics.flush()
        self._draw(row)
        if self._wandb is not None:
            self._wandb.log(scalars(row) | {"consumed-samples": row["consumed_samples"]}, step=row["iteration"])

    def _draw(self, row: Row) -> None:
        if self._tensorboard is None:
            return
        for tag, value in scalars(row).items():
            self._tensorboard.add_scalar(
                tag, value, row["consumed_samples" if tag.endswith(" vs samples") else "iteration"]
            )

    def close(self) -> None:
        """Flush and close everything."""
        for log in (self._metrics, self._text, self._tensorboard):
            if log is not None:
                log.close()
        if self._wandb is not None:
            self._wandb.finish()


def _summary_writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    return SummaryWriter(str(folder))


def _wandb_run(project: str, folder: Path) -> Any:
    import wandb

    return wandb.init(project=project, dir=str(folder), name=folder.name)


def mfu(tflops_per_rank: float, device_name: str) -> float | None:
    """Share of the device's dense bf16 peak; None where the peak is not known."""
    peak = next((peak for name, peak in PEAK_BF16_TFLOPS.items() if name in device_name), None)
    return None if peak is None else tflops_per_rank / peak
