"""Megatron-LM itself, as megatron-core's wheel ships it: arguments, GPT model, optimizer, checkpoint reader and writer.

Runs on a CPU under megacpt's redirection, inside a rank that `megacpt.runtime.setup` has set up. Nothing is replaced
but the queue between the process that writes files and itself, as in `megacpt.train.checkpoint`.
"""

import contextlib
import io
import queue
import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from megacpt.runtime.setup import Layout, setup
from tests.jobs import SEQ_LENGTH, SHAPE, VOCABULARY

FLAGS = f"""
--num-layers {SHAPE["num_layers"]} --hidden-size {SHAPE["hidden_size"]} --ffn-hidden-size {SHAPE["ffn_hidden_size"]}
--num-attention-heads {SHAPE["num_attention_heads"]} --group-query-attention
--num-query-groups {SHAPE["num_query_groups"]} --rotary-base {SHAPE["rotary_base"]}
--norm-epsilon {SHAPE["norm_epsilon"]} --max-position-embeddings {SHAPE["max_position_embeddings"]}
--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --init-method-std 0.1
--hidden-dropout 0 --attention-dropout 0 --tokenizer-type NullTokenizer --vocab-size {VOCABULARY}
--seq-length {SEQ_LENGTH} --micro-batch-size 2 --global-batch-size 8 --train-iters 10
--lr 3e-3 --lr-decay-style constant --weight-decay 0.1 --clip-grad 0.5 --adam-eps 1e-5 --adam-beta2 0.95
--ckpt-format torch_dist --save-interval 5
--transformer-impl local --use-cpu-initialization --no-persist-layer-norm --no-gradient-accumulation-fusion
--no-bias-swiglu-fusion --no-rope-fusion --no-masked-softmax-fusion
""".split()
"""megatron-core's words for `tests.jobs.SHAPE` and its job; the last two lines need no GPU."""


@dataclass
class Peer:
    """What Megatron-LM's training script holds once it has built its model."""

    args: Namespace
    chunks: list[Any]
    optimizer: Any
    scheduler: Any


def arguments(*flags: str) -> Namespace:
    """Parsed and validated as by `pretrain_gpt.py FLAGS flags`; global, as its code wants them."""
    from megatron.training import arguments, global_vars
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    given, sys.argv = sys.argv, ["pretrain_gpt.py", *FLAGS, *flags]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            args = arguments.parse_args()
            arguments.validate_args(args)
            args.padded_vocab_size = calculate_padded_vocab_size(
                args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
            )
    finally:
        sys.argv = given
    global_vars.set_args(args)
    init_num_microbatches_calculator(args.rank, None, args.global_batch_size, args.micro_batch_size, 1)
    return args


def build(*flags: str, keys_map: bool = True) -> Peer:
    """A rank alone: arguments, model, optimizer, scheduler. Without `keys_map`, norms are saved under their own names.

    Tensor parallelism is not for a CPU: the arguments' check then asks for the GPU's architecture.
    """
    from megatron.training import training
    from megatron.training.arguments import core_transformer_config_from_args

    setup(Layout(1), seed=1, threads=1)
    args = arguments(*flags)

    def provide(pre_process: bool, post_process: bool, config: Any = None, **_: Any) -> GPTModel:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        if not keys_map:
            spec.submodules.sharded_state_dict_keys_map = {}
        return GPTModel(
            core_transformer_config_from_args(args),
            spec,
            args.padded_vocab_size,
            args.max_position_embeddings,
            pre_process,
            post_process,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rotary_base=args.rotary_base,
        )

    with contextlib.redirect_stdout(io.StringIO()):
        chunks = training.get_model(provide)
        config, overrides = training.get_megatron_optimizer_config(args)
        optimizer = get_megatron_optimizer(config, chunks, overrides, use_gloo_process_groups=False)
        scheduler = training.get_optimizer_param_scheduler(optimizer)
    return Peer(args, chunks, optimizer, scheduler)


def save(peer: Peer, iteration: int) -> None:
    """Megatron-LM's writer, into `args.save`."""
    from megatron.training.checkpointing import save_checkpoint

    filesystem_async._results_queue = queue.Queue()
    with contextlib.redirect_stdout(io.StringIO()):
        save_checkpoint(iteration, peer.chunks, peer.optimizer, peer.scheduler, 0)


def load(peer: Peer) -> int:
    """Megatron-LM's reader, from `args.load`; the iteration at which it would go on."""
    from megatron.training.checkpointing import load_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):
        return load_checkpoint(peer.chunks, peer.optimizer, peer.scheduler)[0]


def recovered_arguments(peer: Peer, names: Iterable[str]) -> dict[str, Any]:
    """What `--use-checkpoint-args` finds in the checkpoint at `args.load` where the command line says nothing."""
    from megatron.training.checkpointing import load_args_from_checkpoint

    args = Namespace(**vars(peer.args) | dict.fromkeys(names))
    with contextlib.redirect_stdout(io.StringIO()):
        load_args_from_checkpoint(args)
    return {name: getattr(args, name) for name in names}


def logits(peer: Peer, tokens_BS: torch.Tensor) -> torch.Tensor:
    """[b, s, v] with all of the padded vocabulary, which Megatron-LM does not mask."""
    positions = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    size = tokens_BS.shape[1]
    future = torch.ones(size, size, dtype=torch.bool).triu(1)[None, None]
    (chunk,) = peer.chunks
    return gather_from_tensor_model_parallel_region(chunk(tokens_BS, positions, future))


def mean_loss(logits_BSV: torch.Tensor, batch: dict[str, torch.Tensor], vocabulary: int) -> torch.Tensor:
    """Mean over unmasked targets, with the first `vocabulary` columns in the softmax."""
    losses = F.cross_entropy(logits_BSV[..., :vocabulary].flatten(0, 1), batch["labels"].flatten(), reduction="none")
    mask = batch["loss_mask"].flatten()
    return (losses * mask).sum() / mask.sum()


def step(peer: Peer, batch: dict[str, torch.Tensor]) -> float:
    """One training step on a whole batch; the loss before it."""
    (chunk,) = peer.chunks
    chunk.zero_grad_buffer()
    peer.optimizer.zero_grad()
    loss = mean_loss(logits(peer, batch["tokens"]), batch, peer.args.vocab_size)
    loss.backward()
    chunk.finish_grad_sync()
    peer.optimizer.step()
    peer.scheduler.step(increment=peer.args.global_batch_size)
    return float(loss)


def where(folder: Path, *flags: str) -> tuple[str, ...]:
    """Flags for a place to save to and to load from."""
    return ("--save", str(folder), "--load", str(folder), *flags)
