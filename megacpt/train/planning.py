"""From a configuration to a checked plan: against itself, the layout, the datasets on disk and the checkpoints."""

from collections.abc import Sequence
from pathlib import Path

import torch

from megacpt.config.architecture import WEIGHT_FIELDS, Architecture, resolve_architecture
from megacpt.config.check import check_config, check_micro_batches
from megacpt.config.check_engine import check_engine
from megacpt.config.tree import Config
from megacpt.data.samples.batches import BatchLayout
from megacpt.data.samples.blended import Corpus, EvalSet, SourceStream
from megacpt.data.tokens.indexed import IndexedDataset, bin_path
from megacpt.data.tokens.manifest import read_manifest
from megacpt.data.tokens.tokenizer import load_tokenizer
from megacpt.errors import UserError
from megacpt.model.hf.families import family_for
from megacpt.model.hf.reference import require_transformers
from megacpt.runtime.engine import choose_transformer_impl
from megacpt.runtime.environment import version_of
from megacpt.runtime.setup import Layout
from megacpt.train.checkpoint import find_checkpoint, read_state
from megacpt.train.foreign import check_foreign, read_foreign
from megacpt.train.guard import read_end
from megacpt.train.mixing import named_sources, open_corpora, solve_mixture
from megacpt.train.origin import Origin, find_tokenizer, open_hf, origin_of
from megacpt.train.plan import Plan, Resume, Vocabulary
from megacpt.train.schedule import LRSchedule
from megacpt.train.tasks import check_task_settings

EVAL_SEED = 0
"""Of the order of held-out sets: runs that differ by their seed are evaluated on the same samples."""
SCAN_LIMIT = 256 << 20
"""Bytes of tokens up to which a dataset without a manifest is scanned for foreign tokens before training."""


def make_plan(config: Config, world_size: int, *, on_gpu: bool) -> Plan:
    """Check the configuration against itself, the layout, the datasets on disk and the checkpoint to resume from.

    Reads files, changes none.

    Raises:
        UserError: the first thing that cannot work, in one sentence.
    """
    model, train = config.model, config.train
    layout = Layout(
        world_size,
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.virtual_pipeline_model_parallel_size,
        model.context_parallel_size,
    )
    layout.check()
    batches = BatchLayout(train.global_batch_size, train.micro_batch_size, 0, layout.data)
    check_micro_batches(config, batches.micro_batches)
    named = named_sources(config.data)
    corpora = open_corpora(named)
    held_out = {name: Corpus.open(path) for name, path in config.eval.sets.items()}
    vocabulary = _vocabulary(config, [s.path for s in named.values()] + list(config.eval.sets.values()))
    resume = _find_resume(config)
    origin = _origin(config, resume)
    architecture = resolve_architecture(model, vocabulary.size if vocabulary else None, origin.base if origin else None)
    check_config(config, architecture)
    dtype = torch.bfloat16 if (config.precision.dtype or ("bf16" if on_gpu else "fp32")) == "bf16" else torch.float32
    layers = choose_transformer_impl(model.transformer_impl, on_gpu=on_gpu)
    check_engine(config, architecture, engine=layers.engine, on_gpu=on_gpu, bf16=dtype is torch.bfloat16)
    if config.save.hf_every is not None and origin is None:
        family_for(architecture)
    _check_tokenizer(config, origin, vocabulary)
    if config.logging.wandb_project is not None and version_of("wandb") == "absent":
        raise UserError("logging.wandb_project is set, but wandb is not installed; install it or unset the key")
    vocabulary = vocabulary or Vocabulary(architecture.vocab_size, None)
    datasets = [corpus.dataset for corpus in (*corpora.values(), *held_out.values())]
    _check_tokens(datasets, architecture.vocab_size, vocabulary)
    schedule = LRSchedule(lr=config.optimizer.lr, min_lr=config.optimizer.min_lr, **config.schedule.model_dump())
    mixture, notes = solve_mixture(config, corpora, schedule, resume)
    schedule.check(mixture.steps_available, train.global_batch_size)
    ended, more = read_end(config, resume.state.iteration) if resume is not None else (None, ())
    plan = Plan(
        config=config,
        layout=layout,
        architecture=architecture,
        vocabulary=vocabulary,
        mixture=mixture,
        corpora=corpora,
        eval_sets=_eval_sets(config, held_out, architecture),
        schedule=schedule,
        resume=resume,
        dtype=dtype,
        on_gpu=on_gpu,
        layers=layers,
        origin=origin,
        notes=(*notes, *more),
        ended=ended,
        absent_tasks=check_task_settings(config, origin),
    )
    _check_identity(plan)
    _check_init(plan)
    _check_probe(plan)
    return plan


def _eval_sets(config: Config, held_out: dict[str, Corpus], architecture: Architecture) -> dict[str, EvalSet]:
    size, vocabulary = config.data.seq_length, architecture.vocab_size
    limit = config.eval.iters and config.eval.iters * config.train.global_batch_size
    streams = {name: SourceStream(data, name, size, EVAL_SEED, vocabulary) for name, data in held_out.items()}
    return {name: EvalSet(stream, limit) for name, stream in streams.items()}


def _find_resume(config: Config) -> Resume | None:
    folder = find_checkpoint(Path(config.save.dir) / "checkpoints")
    if folder is None:
        return None
    state = read_state(folder)
    if state is None:
        raise UserError(
            f"{folder}: not written by megacpt; choose another save.dir and start with init.checkpoint={folder}"
        )
    return Resume(folder, state)


def _origin(config: Config, resume: Resume | None) -> Origin | None:
    """The Hugging Face model that the weights began as: of the checkpoint to go on from, or of `init`."""
    if resume is not None:
        return origin_of(resume.folder)
    if config.init.hf is not None:
        if config.init.gate:
            require_transformers()
        return open_hf(config.init.hf)
    folder = find_checkpoint(config.init.checkpoint) if config.init.checkpoint is not None else None
    return origin_of(folder) if folder is not None else None


def _check_tokenizer(config: Config, origin: Origin | None, vocabulary: Vocabulary | None) -> None:
    """Refuse tokens of another tokenizer than the model's, unless the configuration names theirs."""
    if origin is None or vocabulary is None or config.tokenizer is not None:
        return
    own = find_tokenizer(origin.folder, vocabulary.type)
    if own is not None and own.sha256 != vocabulary.sha256:
        raise UserError(
            f"{origin.folder}: its tokenizer (vocabulary {own.vocab_size:,}) is not the one that made the datasets "
            f"(vocabulary {vocabulary.size:,}); preprocess them with the model's, or name theirs in section tokenizer"
        )


def _check_identity(plan: Plan) -> None:
    if plan.resume is None:
        return
    old, new = plan.resume.state.identity, plan.identity()
    for key in new:
        if old.get(key) != new[key]:
            raise UserError(
                f"{plan.resume.folder}: {key} was {old.get(key)} in this run and is now {new[key]}; restore it, or "
                "choose another save.dir and start from these weights with init.checkpoint"
            )


def _check_probe(plan: Plan) -> None:
    settings, sources = plan.config.diagnostics.gradient_probe, [source.name for source in plan.mixture.sources]
    unknown = [name for name in settings.domain if name not in sources]
    if unknown:
        raise UserError(
            f"diagnostics.gradient_probe.domain: there is no source '{unknown[0]}'; data has {', '.join(sources)}"
        )
    if (settings.at or settings.every is not None) and not 0 < len(set(plan.domain)) < len(sources):
        raise UserError(
            "diagnostics.gradient_probe compares the domain's sources with others: name the domain in its key domain "
            "or in data.mixture.with, and have at least one source beside it"
        )


def _check_init(plan: Plan) -> None:
    """Refuse starting weights of another shape or vocabulary before a model is built."""
    place = plan.config.init.checkpoint
    if place is None or plan.resume is not None:
        return
    folder = find_checkpoint(place)
    if folder is None:
        raise UserError(
            f"init.checkpoint {place}: no checkpoint there; name a run, its checkpoints or an iter_* folder"
        )
    state = read_state(folder)
    stored = read_foreign(folder)
    if state is None:
        check_foreign(stored, plan.architecture)
        return
    new = plan.identity()
    for key in [f"model.{name}" for name in WEIGHT_FIELDS] + ["tokenizer"]:
        if state.identity[key] != new[key] and None not in (state.identity[key], new[key]):
            raise UserError(
                f"init.checkpoint {folder}: its {key} is {state.identity[key]}, this run's is {new[key]}; make them "
                "equal or choose another checkpoint"
            )


def _vocabulary(config: Config, prefixes: Sequence[str]) -> Vocabulary | None:
    """The tokenizer that made every dataset, from the configuration and the datasets' manifests, which must agree."""
    found: dict[str, Vocabulary] = {}
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer.type, config.tokenizer.model)
        found["the configured tokenizer"] = Vocabulary(tokenizer.vocab_size, tokenizer.sha256, tokenizer.type)
    for prefix in prefixes:
        manifest = read_manifest(prefix)
        if manifest is not None:
            made_by = manifest.tokenizer
            found[prefix] = Vocabulary(made_by.vocab_size, made_by.sha256, made_by.type)
    if not found:
        return None
    (first, vocabulary), *rest = found.items()
    for where, other in rest:
        if other != vocabulary:
            raise UserError(
                f"{where}: made with another tokenizer (vocabulary {other.size:,}) than {first} (vocabulary "
                f"{vocabulary.size:,}); preprocess both with the same one"
            )
    return vocabulary


def _check_tokens(datasets: Sequence[IndexedDataset], vocab_size: int, vocabulary: Vocabulary) -> None:
    """Refuse foreign tokens now where that is cheap; every sample is checked again when it is read."""
    if vocabulary.size > vocab_size:
        raise UserError(
            f"the tokenizer has {vocabulary.size:,} tokens, the model {vocab_size:,} (model.vocab_size); "
            "use the model's own tokenizer, or enlarge model.vocab_size"
        )
    for dataset in datasets:
        if bin_path(dataset.prefix).stat().st_size <= SCAN_LIMIT:
            dataset.check_vocabulary(vocab_size)
