"""The only wiring: from a plan to a job."""

from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import parallel_state

from megacpt.config.load import dump_config
from megacpt.data.samples.batches import BatchLayout, micro_batches
from megacpt.data.samples.blended import BlendedDataset
from megacpt.files import disk_errors, lock, write_text
from megacpt.model.build import BuildOptions, build_chunks, freeze_layers, transformer_config
from megacpt.model.forward import Batch, stage_reads_batches
from megacpt.model.full_precision import Originals
from megacpt.model.userbuffers import make_userbuffers
from megacpt.runtime.setup import Rank
from megacpt.train.checkpoint import load_all, remove_partial
from megacpt.train.guard import Watch
from megacpt.train.job import Job
from megacpt.train.main_parameters import set_main_parameters
from megacpt.train.metrics import MetricsLog
from megacpt.train.optimizer import build_optimizer, wrap_chunks
from megacpt.train.plan import Plan
from megacpt.train.progress import progress_at_start
from megacpt.train.start import base_weights, initial_weights
from megacpt.train.step_zero import StepZero
from megacpt.train.tasks import build_tasks


def build_job(plan: Plan, rank: Rank) -> Job:
    """Build the model, load or draw its weights, wrap it, build the optimizer, open the data and the log.

    Raises:
        UserError: a checkpoint does not fit, or the run folder cannot be written.
    """
    config = plan.config
    options = BuildOptions(plan.dtype, config.data.reset_position_ids, engine=plan.layers.engine)
    if config.model.tp_comm_overlap:
        make_userbuffers(config, plan.architecture)
    chunks = build_chunks(
        plan.architecture, config.model, transformer_config(plan.architecture, config.model, options), options
    )
    originals: Originals = {}
    verdict = initial_weights(plan, chunks, originals) if plan.resume is None else None
    base = base_weights(plan, chunks) if plan.measures_weights and plan.ended is None else None
    freeze_layers(chunks, config.train.freeze)
    wrapped = wrap_chunks(chunks, config.optimizer, config.precision)
    optimizer = build_optimizer(
        wrapped,
        config.optimizer,
        plan.dtype,
        torch.float32 if config.precision.grad_reduce_in_fp32 else plan.dtype,
    )
    set_main_parameters(optimizer, originals)
    originals.clear()
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
    watch = Watch(config.guard, config.save.best, log.evaluations) if log is not None else None
    if watch is not None:
        watch.look_back(folder / "checkpoints")
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
        progress=progress_at_start(plan),
        watch=watch,
        ended=plan.ended,
        base=base,
        tasks=build_tasks(plan, is_first=rank.is_first),
        step_zero=StepZero.open(folder, resumes=plan.resume is not None) if rank.is_first else None,
    )


def _training_batches(plan: Plan, batch_layout: BatchLayout) -> Iterator[Batch] | None:
    documents = plan.config.data.reset_attention_mask
    if not stage_reads_batches(documents):
        return None
    dataset = BlendedDataset(plan.mixture, plan.corpora, plan.architecture.vocab_size)
    size = plan.mixture.global_batch_size
    if plan.first_iteration < plan.last_iteration:
        dataset.prepare(plan.first_iteration * size)
    span = range(plan.first_iteration * size, plan.last_iteration * size)
    return micro_batches(dataset, batch_layout, span, plan.config.data.num_workers, documents)


def _open_log(plan: Plan) -> MetricsLog:
    config, folder = plan.config, Path(plan.config.save.dir)
    with disk_errors(folder):
        # First, for what a killed save left may have filled the disk.
        remove_partial(folder / "checkpoints")
        write_text(folder / "config.yaml", dump_config(config))
        if plan.origin is not None and plan.base_folder is not None:
            plan.origin.write(plan.base_folder, plan.architecture)
        return MetricsLog(
            folder,
            # What came after the checkpoint to which the guard went back is the evidence, and stays.
            plan.first_iteration if plan.ended is None else plan.ended.iteration,
            plan.last_iteration,
            tensorboard=config.logging.tensorboard,
            wandb_project=config.logging.wandb_project,
        )
