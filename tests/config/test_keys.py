"""Every key that a configuration may have: a new one, or one that is gone, has to be written here too."""

from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel

from megacpt.config.tree import Config

KEYS = """
tokenizer.type
tokenizer.model
precision.dtype
precision.grad_reduce_in_fp32
model.preset
model.num_layers
model.hidden_size
model.ffn_hidden_size
model.num_attention_heads
model.num_query_groups
model.kv_channels
model.rotary_base
model.rope_scaling_factor
model.norm_epsilon
model.normalization
model.swiglu
model.add_bias_linear
model.rotary_percent
model.use_parallel_residual
model.untie_embeddings_and_output_weights
model.max_position_embeddings
model.vocab_size
model.make_vocab_size_divisible_by
model.init_method_std
model.tensor_model_parallel_size
model.pipeline_model_parallel_size
model.virtual_pipeline_model_parallel_size
model.context_parallel_size
model.sequence_parallel
model.cp_comm_type
model.transformer_impl
model.attention_backend
model.fp8
model.fp8_recipe
model.fp8_margin
model.fp8_amax_history_len
model.fp8_amax_compute_algo
model.fp8_param_gather
model.first_last_layers_bf16
model.num_layers_at_start_in_bf16
model.num_layers_at_end_in_bf16
model.tp_comm_overlap
model.gradient_accumulation_fusion
model.cross_entropy_loss_fusion
model.cross_entropy_fusion_impl
model.swiglu_fusion_impl
model.rope_fusion_impl
model.cuda_graph_impl
model.recompute_granularity
model.recompute_modules
model.recompute_method
model.recompute_num_layers
data.seq_length
data.sources.NAME.path
data.sources.NAME.subset
data.sources.NAME.tokens
data.sources.NAME.epochs
data.sources.NAME.weight
data.sources.NAME.redraw
data.sources.NAME.repeat
data.data_path
data.mixture.preset
data.mixture.replace
data.mixture.with
data.mixture.replay
data.mixture.pass_tokens
data.mixture.passes
data.phases.after_tokens
data.phases.when_lr_below
data.phases.weights.NAME
data.phases.replay
data.reset_attention_mask
data.reset_position_ids
data.num_workers
data.accept_change
train.train_iters
train.train_samples
train.train_tokens
train.micro_batch_size
train.global_batch_size
train.seed
train.log_interval
train.freeze.top
train.freeze.bottom
optimizer.lr
optimizer.min_lr
optimizer.weight_decay
optimizer.adam_beta1
optimizer.adam_beta2
optimizer.adam_eps
optimizer.clip_grad
optimizer.use_distributed_optimizer
optimizer.overlap_grad_reduce
optimizer.overlap_param_gather
optimizer.use_precision_aware_optimizer
optimizer.exp_avg_dtype
optimizer.exp_avg_sq_dtype
optimizer.optimizer_cpu_offload
optimizer.optimizer_offload_fraction
optimizer.overlap_cpu_optimizer_d2h_h2d
schedule.lr_decay_style
schedule.lr_warmup_fraction
schedule.lr_warmup_iters
schedule.lr_warmup_samples
schedule.lr_warmup_init
schedule.lr_decay_iters
schedule.lr_wsd_decay_style
schedule.lr_wsd_decay_iters
schedule.lr_cooldown_iters
schedule.lr_constant
eval.sets.NAME
eval.at
eval.every
eval.iters
eval.tasks
eval.task_data
eval.task_limit
eval.tasks_at
eval.tasks_every
diagnostics.weight_update.at
diagnostics.weight_update.every
diagnostics.weight_update.layers
diagnostics.gradient_probe.at
diagnostics.gradient_probe.every
diagnostics.gradient_probe.domain
guard.metric
guard.max_drop
guard.action
init.checkpoint
init.hf
init.gate
save.dir
save.interval
save.keep_last
save.best.weights.NAME
save.hf_every
logging.tensorboard
logging.wandb_project
runtime.threads
runtime.distributed_timeout_minutes
"""


def sections(annotation: object) -> Iterator[type[BaseModel]]:
    """The section classes inside an annotation such as `Tokenizer | None` or `dict[str, Source]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from sections(part)


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys in the order of the tree; NAME stands for a name of the user's."""
    for name, field in section.model_fields.items():
        inner = next(sections(field.annotation), None)
        named = str(field.annotation).startswith("dict[str")
        path = f"{prefix}{field.alias or name}" + (".NAME" if named else "")
        if inner is None:
            yield path
        else:
            yield from keys(inner, f"{path}.")


def test_the_permitted_keys() -> None:
    assert list(keys(Config)) == KEYS.split()


def test_every_key_says_what_it_means() -> None:
    pending: list[type[BaseModel]] = [Config]
    while pending:
        section = pending.pop()
        for name, field in section.model_fields.items():
            inner = list(sections(field.annotation))
            pending += inner
            assert inner or field.description, f"{section.__name__}.{name} has no description"
