"""Checkpoints in Megatron's layout: `checkpoints/iter_0000500/` (torch_dist) and `latest_checkpointed_iteration.txt`.

A checkpoint is written under a hidden name and renamed when it is whole; only then does the tracker point to it. What a
kill leaves behind is removed at the next start. `megacpt.json` inside says what the run was: iteration, consumed
samples, mixture, vocabulary, shape, layout.
"""

import errno
import json
import os
import queue
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megacpt.config.architecture import DEFAULTS
from megacpt.errors import UserError
from megacpt.files import disk_errors, sync_directory, write_json, write_text
from megacpt.model.full_precision import Originals, holds, narrowed
from megacpt.model.gpt import LanguageModel
from megacpt.train.engine_state import is_engine_state, own_engine_state, without_engine_state
from megacpt.train.foreign import holds_layers_one_by_one, take_stored_names
from megacpt.train.main_parameters import ask_for_main_parameters, make_room, put_main_parameters
from megacpt.train.optimizer import common_optimizer_state, load_optimizer_state, sharded_optimizer_state

FAILURES = (Exception, CheckpointException)
"""What a failing save or load raises; torch's own class is no Exception."""
WEIGHTS = ("embedding.", "decoder.", "output_layer.")
"""How megatron-core's names of a GPTModel's weights begin."""
TRACKER = "latest_checkpointed_iteration.txt"
BEST_TRACKER = "best_checkpointed_iteration.txt"
STATE = "megacpt.json"
BASE = "hf"
"""The folder inside a checkpoint for the small files of the Hugging Face model that it began from."""
RELEASE = "release"
"""Megatron's name for a checkpoint that no training wrote."""
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
"""megatron-core's words for how tensors are named and cut; its loaders ask for them."""


@dataclass(frozen=True)
class TrainState:
    """What a run must know besides tensors to go on as if it had never stopped.

    Attributes:
        interval: sums since the last log line: {"sums": [[loss by source], [tokens by source]], "steps": n}.
        mixture: the mixture's fingerprint; its start and offsets say where it began.
        samples_by_source, tokens_by_source: samples and target tokens seen, by name.
        position_by_source, fixed_by_source: where another mixture would go on in each source, and with which shuffled
            pass the samples that stay the same began (`megacpt.data.mixture.mixture.Start`).
        identity: what a resumed run must share: architecture, vocabulary, tokenizer, precision, frozen layers.
        layout: ranks and threads; another layout resumes, within rounding.
    """

    iteration: int
    consumed_samples: int
    samples_by_source: dict[str, int]
    tokens_by_source: dict[str, int]
    interval: dict[str, Any]
    mixture: dict[str, Any]
    identity: dict[str, Any]
    layout: dict[str, Any]
    versions: dict[str, str]
    position_by_source: dict[str, int] = field(default_factory=dict)
    fixed_by_source: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Beside:
    """What a checkpoint holds beside tensors and state.

    Attributes:
        config_text: the resolved configuration, YAML.
        common: plain values in megatron-core's common state, the same on every rank; for other readers than megacpt.
        base: a folder to copy: the Hugging Face files of the model that the run began from.
    """

    config_text: str
    common: dict[str, Any]
    base: Path | None


@dataclass(frozen=True)
class Kept:
    """Which checkpoints stay: the newest `last` (None: all), and that of iteration `best`, which has a tracker too."""

    last: int | None
    best: int | None = None


def iteration_folder(root: Path, iteration: int) -> Path:
    """Megatron's name for a checkpoint of `iteration`."""
    return root / f"iter_{iteration:07d}"


def find_checkpoint(place: str | Path) -> Path | None:
    """The newest checkpoint under a checkpoints folder or a run folder, or `place` itself; None where there is none.

    Raises:
        UserError: the tracker names a checkpoint that is not there.
    """
    place = Path(place)
    if place.name.startswith("iter_") or (place / ".metadata").is_file():
        return place if place.is_dir() else None
    if not (place / TRACKER).is_file() and (place / "checkpoints" / TRACKER).is_file():
        place = place / "checkpoints"
    if not (place / TRACKER).is_file():
        return None
    content = (place / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    if content == RELEASE:
        folder = place / RELEASE
    elif content.isdigit():
        folder = iteration_folder(place, int(content))
    else:
        raise UserError(f"{place / TRACKER}: holds '{content[:40]}', expected an iteration; correct or remove it")
    if not folder.is_dir():
        raise UserError(f"{place / TRACKER}: names iteration {content}, but {folder} is missing; correct or remove it")
    return folder


def read_state(folder: Path) -> TrainState | None:
    """The state beside a checkpoint's tensors; None for a checkpoint that megacpt did not write.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        state = TrainState(**json.loads(path.read_text(encoding="utf-8")))
        if not (state.mixture["start"] and state.mixture["sources"] and state.layout["threads"]):
            raise ValueError("an empty field")
        unsaid = {f"model.{name}": value for name, value in DEFAULTS.items()}
        return replace(state, identity=unsaid | state.identity)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: damaged ({error!r}); resume from an earlier checkpoint by editing {TRACKER}"
        ) from error


def remove_partial(root: Path) -> None:
    """Remove what a killed save left behind."""
    for leftover in (*root.glob(".iter_*"), *root.glob(f".{RELEASE}.*")):
        shutil.rmtree(leftover, ignore_errors=True)


def _named(chunks: Sequence[LanguageModel]) -> dict[str, LanguageModel]:
    """Megatron's names: `model`, or `model0`, `model1`, ... for virtual pipeline stages."""
    return {"model" if len(chunks) == 1 else f"model{number}": chunk for number, chunk in enumerate(chunks)}


def _model_state(chunks: Sequence[LanguageModel], *, layer_by_layer: bool = False) -> dict[str, Any]:
    metadata = {"non_homogeneous_layers": layer_by_layer}
    return {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _named(chunks).items()}


def _optimizer_state(
    optimizer: MegatronOptimizer, chunks: Sequence[LanguageModel], *, loading: bool
) -> dict[int, dict[int, dict[str, Any]]]:
    # A checkpoint holds a weight of all layers as one tensor. Its moments cannot be one where frozen layers have none.
    model_state = _model_state(chunks, layer_by_layer=any(chunk.some_layers_frozen for chunk in chunks))
    return sharded_optimizer_state(optimizer, model_state, loading=loading)


def save_checkpoint(
    root: Path,
    state: TrainState,
    chunks: Sequence[LanguageModel],
    optimizer: MegatronOptimizer,
    beside: Beside,
    kept: Kept,
) -> Path:
    """Write one checkpoint from all ranks, point the trackers, and drop what is not to be kept.

    Raises:
        UserError: the disk is full or the folder cannot be written; the previous checkpoint stays valid.
    """

    def sharded() -> dict[str, Any]:
        in_common = common_optimizer_state(optimizer, state.iteration)
        optimizer_state = _optimizer_state(optimizer, chunks, loading=False)
        model_state = _model_state(chunks)
        put_main_parameters(model_state, optimizer, optimizer_state)
        return model_state | {"optimizer": optimizer_state | in_common} | beside.common

    def files(folder: Path) -> None:
        write_json(folder / STATE, asdict(state))
        write_text(folder / "run_config.yaml", beside.config_text)
        if beside.base is not None:
            shutil.copytree(beside.base, folder / BASE)

    final = _publish(iteration_folder(root, state.iteration), str(state.iteration), sharded, files)
    if dist.get_rank() == 0:
        with disk_errors(root / BEST_TRACKER):
            if kept.best is None:
                (root / BEST_TRACKER).unlink(missing_ok=True)
            else:
                write_text(root / BEST_TRACKER, f"{kept.best}\n")
        for old in _surplus(final, kept):
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


def point_to(root: Path, iteration: int) -> None:
    """Make the run go on from its checkpoint of `iteration`, whatever newer ones there are; on every rank."""
    if dist.get_rank() == 0:
        write_text(root / TRACKER, f"{iteration}\n")
    dist.barrier()


def save_weights(root: Path, chunks: Sequence[LanguageModel], write_base: Callable[[Path], None]) -> Path:
    """Write weights alone, from all ranks, as Megatron's `release` checkpoint.

    Args:
        write_base: writes the Hugging Face files of the model into the folder that it is given.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    return _publish(
        root / RELEASE,
        RELEASE,
        lambda: _model_state(chunks) | {"iteration": 0, "checkpoint_version": 3.0},
        lambda folder: write_base(folder / BASE),
    )


def _publish(final: Path, tracked: str, sharded: Callable[[], dict[str, Any]], files: Callable[[Path], None]) -> Path:
    """Write under a hidden name from all ranks, rename, point the tracker to it."""
    root = final.parent
    partial = root / f".{final.name}.partial"
    first = dist.get_rank() == 0
    with disk_errors(final), _removed_on_failure(partial):
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        _write(sharded(), partial)
        dist.barrier()
        if first:
            files(partial)
            if final.exists():
                shutil.rmtree(final)
            os.rename(partial, final)
            sync_directory(root)
            write_text(root / TRACKER, f"{tracked}\n")
        dist.barrier()
    return final


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(sharded: dict[str, Any], folder: Path) -> None:
    # megacpt saves synchronously, in this process. megatron-core's writer would start a manager process (which imports
    # the main module again) only to hand results from the process that wrote them to this one: give it a plain queue.
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
    try:
        dist_checkpointing.save(sharded, str(folder), async_strategy="mcore", content_metadata=dict(CONTENT))
    except FAILURES as error:
        # The writer passes errors on as text; a full disk is then no OSError any more.
        if os.strerror(errno.ENOSPC) in str(error) or shutil.disk_usage(folder).free == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def _surplus(newest: Path, kept: Kept) -> list[Path]:
    # Checkpoints beyond `newest` are there when a user went back to an older one: they are not this run's to count.
    oldest_first = sorted(old for old in newest.parent.glob("iter_*") if old <= newest)
    best = iteration_folder(newest.parent, kept.best) if kept.best is not None else None
    return [old for old in oldest_first[: -kept.last] if old != best] if kept.last else []


def load_weights(folder: Path, chunks: Sequence[LanguageModel], originals: Originals | None = None) -> None:
    """Fill the model's parameters from a checkpoint of any layout, megacpt's or Megatron-LM's.

    Other vocabulary padding is cut or zeroed.

    Args:
        originals: gets what the parameters cannot hold: of fp32 weights, or of the main parameters beside weights.

    Raises:
        UserError: the checkpoint's weights are not exactly this model's, in name and shape.
    """
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    sharded = without_engine_state(_model_state(chunks, layer_by_layer=holds_layers_one_by_one(stored)))
    take_stored_names(sharded, stored)
    instead = set() if originals is None else ask_for_main_parameters(sharded, stored)
    loaded, left_over, absent = _load(sharded, folder, strict="return_all")
    for has, keys in (("lacks", absent), ("holds", left_over)):
        weights = sorted(key for key in keys - instead if key.startswith(WEIGHTS) and not is_engine_state(key))
        if weights:
            raise UserError(
                f"{folder}: {has} {weights[0]}, which this run's model has{'' if has == 'lacks' else ' not'}; choose a "
                "checkpoint of the same model, or correct model.*"
            )
    _restore_weights(chunks, loaded, {} if originals is None else originals)


def load_all(folder: Path, chunks: Sequence[LanguageModel], optimizer: MegatronOptimizer, iteration: int) -> None:
    """Fill parameters and optimizer state from a checkpoint of any layout."""
    sharded = _model_state(chunks)
    make_room(sharded)
    sharded["optimizer"] = _optimizer_state(optimizer, chunks, loading=True)
    loaded, _, absent = _load(sharded, folder, strict="return_all")
    missing = sorted(key for key in absent if not is_engine_state(key))
    if missing:
        raise UserError(f"{folder}: lacks {missing[0]}, which this run needs; choose another checkpoint")
    with own_engine_state():
        _restore_weights(chunks, loaded, {})
    load_optimizer_state(optimizer, loaded.get("optimizer", {}), iteration)


def _load(sharded: dict[str, Any], folder: Path, **options: Any) -> Any:
    try:
        return dist_checkpointing.load(sharded, str(folder), **options)
    except FAILURES as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise UserError(
            f"{folder}: cannot be loaded ({reason[:300]}); it is damaged or of another model, choose another checkpoint"
        ) from error


def _restore_weights(chunks: Sequence[LanguageModel], loaded: dict[str, Any], originals: Originals) -> None:
    for name, chunk in _named(chunks).items():
        for key, parameter in chunk.named_parameters():
            if not holds(parameter, loaded[name][key].dtype):
                loaded[name][key] = narrowed(parameter, loaded[name][key], originals)
        # FP8's history may be absent: it was not asked for, or the checkpoint is one of local layers.
        result = chunk.load_state_dict(loaded[name], strict=False)
        wrong = [key for key in (*result.missing_keys, *result.unexpected_keys) if not is_engine_state(key)]
        assert not wrong, f"loaded state and model differ: {wrong}"
