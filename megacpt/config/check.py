"""Checks across fields of the configuration: what no single key can know."""

import re

from megacpt.config.architecture import Architecture
from megacpt.config.tree import Config, Model
from megacpt.errors import UserError

VALIDATION_METRICS = ("loss", "ppl", "accuracy", "bits_per_byte")


def check_config(config: Config, architecture: Architecture) -> None:
    """Refuse what megacpt or megatron-core cannot run, before anything is built.

    Raises:
        UserError: one sentence that names the keys.
    """
    check_layout(config.model, architecture)
    model, data = config.model, config.data
    if data.seq_length > architecture.max_position_embeddings:
        raise UserError(
            f"data.seq_length {data.seq_length} is longer than model.max_position_embeddings "
            f"{architecture.max_position_embeddings}; shorten it or raise the limit"
        )
    tp = model.tensor_model_parallel_size
    if model.sequence_parallel and tp == 1:
        raise UserError("model.sequence_parallel needs model.tensor_model_parallel_size > 1; unset it or raise TP")
    if model.sequence_parallel and data.seq_length % tp:
        raise UserError(
            f"model.sequence_parallel cuts sequences over {tp} ranks, but data.seq_length {data.seq_length} is "
            "not divisible; choose a multiple"
        )
    if data.reset_position_ids != data.reset_attention_mask:
        raise UserError(
            "data.reset_attention_mask and data.reset_position_ids go together: attention inside a document needs "
            "rotary phases that restart with it; set both or neither"
        )
    frozen = config.train.freeze.top + config.train.freeze.bottom
    if frozen > architecture.num_layers:
        raise UserError(
            f"train.freeze: {frozen} layers are frozen, the model has {architecture.num_layers}; freeze fewer"
        )
    _check_recompute(config, architecture)
    if config.optimizer.overlap_param_gather and not config.optimizer.use_distributed_optimizer:
        raise UserError("optimizer.overlap_param_gather needs optimizer.use_distributed_optimizer; set both or neither")
    if config.optimizer.overlap_param_gather and not config.optimizer.overlap_grad_reduce:
        raise UserError("optimizer.overlap_param_gather needs optimizer.overlap_grad_reduce; set both or neither")
    if config.init.checkpoint is not None and config.init.hf is not None:
        raise UserError("init.checkpoint and init.hf are both set; keep one of them")
    _check_guard(config)


def _check_guard(config: Config) -> None:
    guard, best = config.guard, config.save.best
    if guard is not None:
        _check_metric("guard.metric", guard.metric, config)
        of_tasks = config.eval.tasks_at is not None and not guard.metric.startswith("validation/")
        if 0 not in ((config.eval.tasks_at or []) if of_tasks else config.eval.at):
            key = "eval.tasks_at" if of_tasks else "eval.at"
            raise UserError(f"guard compares with the evaluation at step 0; put 0 into {key}")
        if guard.action == "rollback" and best is None:
            raise UserError("guard.action rollback goes back to the best checkpoint; say which is best in save.best")
    if best is not None and not best.weights:
        raise UserError("save.best.weights is empty; name at least one metric, such as validation/NAME/loss: -1")
    for name in best.weights if best is not None else ():
        _check_metric("save.best.weights", name, config)


def _check_metric(key: str, name: str, config: Config) -> None:
    if re.fullmatch(r"(task|suite)/[^/]+/[^/]+", name):
        if not config.eval.tasks:
            raise UserError(f"{key}: '{name}' is of a task, and eval.tasks names none; add it there")
        return
    kind, _, rest = name.partition("/")
    eval_set, _, metric = rest.rpartition("/")
    if kind != "validation" or metric not in VALIDATION_METRICS:
        raise UserError(
            f"{key}: '{name}' is no metric; write validation/SET/({'|'.join(VALIDATION_METRICS)}), task/NAME/METRIC or "
            "suite/NAME/mean"
        )
    if eval_set not in config.eval.sets:
        raise UserError(f"{key}: '{name}' names a set that eval.sets does not have; add it or correct the name")


def check_layout(model: Model, architecture: Architecture) -> None:
    """Refuse tensor and pipeline parallel sizes that do not divide the model.

    Raises:
        UserError: one sentence that names the keys.
    """
    _check_tensor_parallel(model, architecture)
    _check_pipeline(model, architecture)


def _check_tensor_parallel(model: Model, architecture: Architecture) -> None:
    tp = model.tensor_model_parallel_size
    sizes = {
        "num_attention_heads": architecture.num_attention_heads,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "hidden_size": architecture.hidden_size,
    }
    for name, size in sizes.items():
        if size % tp:
            raise UserError(
                f"model.tensor_model_parallel_size {tp} does not divide model.{name} {size}; choose a divisor"
            )
    groups = architecture.num_query_groups
    if max(groups, tp) % min(groups, tp):
        raise UserError(
            f"model.tensor_model_parallel_size {tp} and model.num_query_groups {groups} do not divide one another; "
            "choose a divisor"
        )
    if architecture.qkv_size % tp:
        raise UserError(
            f"model.tensor_model_parallel_size {tp} does not divide the {architecture.qkv_size} rows of queries, keys "
            "and values (kv_channels x (num_attention_heads + 2 num_query_groups)); choose a divisor"
        )


def _check_pipeline(model: Model, architecture: Architecture) -> None:
    pp, vp = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    if architecture.num_layers % pp:
        raise UserError(
            f"model.pipeline_model_parallel_size {pp} does not divide model.num_layers {architecture.num_layers}; "
            "choose a divisor"
        )
    if vp is None:
        return
    if pp == 1:
        raise UserError("model.virtual_pipeline_model_parallel_size needs model.pipeline_model_parallel_size > 1")
    if vp == 1:
        raise UserError("model.virtual_pipeline_model_parallel_size 1 interleaves nothing; set it to null or raise it")
    if architecture.num_layers % (pp * vp):
        raise UserError(
            f"model.virtual_pipeline_model_parallel_size {vp} x pipeline_model_parallel_size {pp} does not divide "
            f"model.num_layers {architecture.num_layers}; choose divisors"
        )


def check_micro_batches(config: Config, micro_batches: int) -> None:
    """The interleaved schedule deals micro-batches to stages in rounds of PP."""
    pp = config.model.pipeline_model_parallel_size
    if config.model.virtual_pipeline_model_parallel_size is not None and micro_batches % pp:
        raise UserError(
            f"with virtual pipeline stages the {micro_batches} micro-batches of a step must be a multiple of "
            f"model.pipeline_model_parallel_size {pp}; change train.global_batch_size or train.micro_batch_size"
        )


def _check_recompute(config: Config, architecture: Architecture) -> None:
    model = config.model
    full = model.recompute_granularity == "full"
    given = model.recompute_method is not None, model.recompute_num_layers is not None
    if full and not all(given):
        raise UserError("model.recompute_granularity full needs recompute_method and recompute_num_layers")
    if model.recompute_modules is not None and model.recompute_granularity != "selective":
        raise UserError(
            "model.recompute_modules belongs to model.recompute_granularity: selective; set it or drop both"
        )
    if not full and any(given):
        raise UserError("model.recompute_method and recompute_num_layers belong to recompute_granularity: full")
    if full and (model.recompute_num_layers or 0) > architecture.num_layers // model.pipeline_model_parallel_size:
        raise UserError(
            f"model.recompute_num_layers {model.recompute_num_layers} is more than a pipeline stage has layers; "
            "lower it"
        )
