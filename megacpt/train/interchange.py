"""What Megatron-LM's `--load` looks for in a checkpoint besides tensors, as plain values.

megacpt reads none of it back. Keys are those of megatron-core 0.19's `megatron.training.checkpointing`.
"""

from argparse import Namespace
from typing import Any

import torch

from megacpt.train.plan import Plan


def megatron_state(plan: Plan, iteration: int) -> dict[str, Any]:
    """The entries of a checkpoint's common state that make it one of Megatron-LM's, after `iteration`."""
    mixture = plan.mixture
    tokens = iteration * mixture.global_batch_size * mixture.seq_length
    return {
        "args": megatron_arguments(plan, iteration),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "num_floating_point_operations_so_far": tokens * plan.architecture.flops_per_token(mixture.seq_length),
        "opt_param_scheduler": _scheduler(plan, iteration),
    }


def megatron_arguments(plan: Plan, iteration: int) -> Namespace:
    """The run in Megatron-LM's arguments: what its loader compares, and what `--use-checkpoint-args` takes over.

    Megatron-LM has no parallel residual and no argument to say so: it reads such a model's weights as another model's.
    """
    shape, layout, config = plan.architecture, plan.layout, plan.config
    divisible_by = config.model.make_vocab_size_divisible_by
    return Namespace(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        group_query_attention=shape.num_query_groups != shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        max_position_embeddings=shape.max_position_embeddings,
        seq_length=config.data.seq_length,
        position_embedding_type="rope",
        add_position_embedding=True,
        rotary_base=shape.rotary_base,
        rotary_percent=shape.rotary_percent,
        rotary_interleaved=False,
        use_rope_scaling=shape.rope_scaling_factor is not None,
        rope_scaling_factor=shape.rope_scaling_factor or 8.0,
        normalization=shape.normalization,
        layernorm_epsilon=shape.norm_epsilon,
        norm_epsilon=shape.norm_epsilon,
        swiglu=shape.swiglu,
        squared_relu=False,
        bias_gelu_fusion=False,  # Megatron-LM's fused GELU is the tanh approximation
        add_bias_linear=shape.add_bias_linear,
        add_qkv_bias=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        apply_query_key_layer_scaling=False,
        untie_embeddings_and_output_weights=shape.untie_embeddings_and_output_weights,
        num_experts=None,
        vocab_size=shape.vocab_size,
        make_vocab_size_divisible_by=divisible_by,
        padded_vocab_size=shape.padded_vocab_size(divisible_by, layout.tensor),
        world_size=layout.world_size,
        data_parallel_size=layout.data,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual,
        context_parallel_size=layout.context,
        expert_model_parallel_size=1,
        sequence_parallel=config.model.sequence_parallel,
        use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
        bf16=plan.dtype is torch.bfloat16,
        fp16=False,
        params_dtype=plan.dtype,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        train_iters=plan.mixture.steps_available,
        iteration=iteration,
        consumed_train_samples=iteration * config.train.global_batch_size,
        skipped_train_samples=0,
        consumed_valid_samples=0,
        seed=config.train.seed,
        ckpt_format="torch_dist",
        no_save_optim=False,
        no_save_rng=True,  # nothing in a step is random; Megatron-LM then looks for no generator states
    )


def _scheduler(plan: Plan, iteration: int) -> dict[str, Any]:
    """The state of Megatron-LM's OptimizerParamScheduler; it counts samples."""
    schedule, mixture = plan.schedule, plan.mixture
    batch, total = mixture.global_batch_size, mixture.steps_available
    decay = plan.config.optimizer.weight_decay
    return {
        "max_lr": schedule.lr,
        "min_lr": schedule.min_lr,
        "lr_warmup_steps": schedule.warmup_steps(total, batch) * batch,
        "lr_decay_steps": schedule.decay_iters(total) * batch,
        "lr_decay_style": schedule.lr_decay_style,
        "num_steps": iteration * batch,
        "start_wd": decay,
        "end_wd": decay,
        "wd_incr_style": "constant",
        "wd_incr_steps": total * batch,
    }
