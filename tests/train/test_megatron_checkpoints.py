"""Checkpoints between Megatron-LM and megacpt, with Megatron-LM's own writer and reader on the other side."""

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import load_common_state_dict, load_tensors_metadata
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from megacpt.config.tree import Config
from megacpt.data.samples.batches import BatchLayout, micro_batches
from megacpt.data.samples.blended import BlendedDataset
from megacpt.model.forward import Batch
from megacpt.train.planning import make_plan
from tests import jobs
from tests.ranks import run_ranks
from tests.train import megatron_lm

if importlib.util.find_spec("megatron.training") is None:
    pytest.skip("this megatron-core ships no megatron.training", allow_module_level=True)

UNTIED = "--untie-embeddings-and-output-weights"
ARGUMENTS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "group_query_attention",
    "num_query_groups",
    "kv_channels",
    "max_position_embeddings",
    "position_embedding_type",
    "rotary_base",
    "normalization",
    "swiglu",
    "add_bias_linear",
    "untie_embeddings_and_output_weights",
)
"""Of those that `--use-checkpoint-args` takes over, the ones that make a Llama."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
}


def _batches(config: Config) -> Iterator[Batch]:
    """The samples of each step, as one batch."""
    plan = make_plan(config, config.model.tensor_model_parallel_size, on_gpu=False)
    size = plan.mixture.global_batch_size
    dataset = BlendedDataset(plan.mixture, plan.corpora, plan.architecture.vocab_size)
    return micro_batches(dataset, BatchLayout(size, size, 0, 1), range(plan.mixture.steps * size), 0, False)


def _write(flags: tuple[str, ...], batch: Batch, names: str) -> tuple[float, float]:
    """Save at iteration 5; Megatron-LM's loss on the batch, as it is and with padding left out of the softmax."""
    peer = megatron_lm.build(*flags, keys_map=names != "norms' own")
    peer.chunks[0].module.config.hetereogenous_dist_checkpoint = names == "layer by layer"
    megatron_lm.save(peer, 5)
    with torch.no_grad():
        logits = megatron_lm.logits(peer, batch["tokens"])
    whole, real = (megatron_lm.mean_loss(logits, batch, size) for size in (logits.shape[-1], jobs.VOCABULARY))
    return float(whole), float(real)


@pytest.mark.parametrize(
    ("tied", "divisible_by", "names", "layouts"),
    [
        (False, 7, "usual", ("TP1", "TP2", "PP2")),
        (True, 1024, "usual", ("PP2",)),
        (False, 1024, "norms' own", ("TP2",)),
        (True, 7, "layer by layer", ("PP2",)),
    ],
)
def test_from_megatron_lm(tmp_path: Path, tied: bool, divisible_by: int, names: str, layouts: tuple[str, ...]) -> None:
    """Training goes on from Megatron-LM's loss; the padding rows are left out, unless they are called tokens."""
    model: dict[str, Any] = {"untie_embeddings_and_output_weights": not tied}
    batch = next(_batches(jobs.small_config(tmp_path, model)))
    flags = megatron_lm.where(tmp_path / "peer", "--make-vocab-size-divisible-by", str(divisible_by))
    ((whole, real),) = run_ranks(_write, 1, (*flags, *([] if tied else [UNTIED])), batch, names)
    assert whole - real > 1e-3, "padding has to matter for the comparison to mean anything"
    init = {"checkpoint": str(tmp_path / "peer")}
    for name in layouts:
        world, layout = LAYOUTS[name]
        config = jobs.small_config(
            tmp_path, model | layout, init=init, train={"train_iters": 3}, save={"dir": str(tmp_path / name)}
        )
        history = run_ranks(jobs.train_steps, world, config)[0]
        assert history[0][0] == pytest.approx(real, rel=1e-5), name
        assert len({loss for loss, *_ in history}) == 3, name
    if "TP1" in layouts:
        sources = {"walks": {"path": str(tmp_path / f"corpus_{jobs.VOCABULARY}"), "weight": 1}}
        model |= {"vocab_size": 504, "make_vocab_size_divisible_by": 1}
        config = jobs.small_config(tmp_path, model, init=init, train={"train_iters": 1}, data={"sources": sources})
        assert run_ranks(jobs.train_steps, 1, config)[0][0][0] == pytest.approx(whole, rel=1e-5)


def _save_and_go_on(config: Config, tokens: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Two steps and a checkpoint; logits at that point [b, s, v], and the losses of two steps more."""
    job = jobs.start(config)
    for _ in range(2):
        jobs.step(job)
    job.save()
    with torch.no_grad():
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        logits = gather_from_tensor_model_parallel_region(job.chunks[0](tokens, positions, None))
    return logits, [jobs.step(job)[0] for _ in range(2)]


def _load_and_go_on(flags: tuple[str, ...], batches: list[Batch]) -> tuple[int, torch.Tensor, list[float]]:
    """Megatron-LM's loader: its iteration, logits of the first batch, losses of training on all of them."""
    peer = megatron_lm.build(*flags)
    iteration = megatron_lm.load(peer)
    assert peer.args.consumed_train_samples == iteration * peer.args.global_batch_size
    recovered = megatron_lm.recovered_arguments(peer, ARGUMENTS)
    assert recovered == {name: getattr(peer.args, name) for name in ARGUMENTS}
    with torch.no_grad():
        logits = megatron_lm.logits(peer, batches[0]["tokens"])
    return iteration, logits, [megatron_lm.step(peer, batch) for batch in batches]


def test_into_megatron_lm(tmp_path: Path) -> None:
    """All of it: `--load` continues the run with moments, step and schedule, at another layout."""
    model = {"vocab_size": 512, "tensor_model_parallel_size": 2}  # without padding, which Megatron-LM would not mask
    config = jobs.small_config(tmp_path, model)
    batches = list(itertools.islice(_batches(config), 2, 4))
    ours, losses = run_ranks(_save_and_go_on, 2, config, batches[0]["tokens"])[0]
    flags = megatron_lm.where(tmp_path / "run" / "checkpoints", UNTIED, "--vocab-size", "512")
    ((iteration, theirs, history),) = run_ranks(_load_and_go_on, 1, flags, batches)
    assert iteration == 2
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert history == pytest.approx(losses, rel=1e-5)


def test_weights_into_megatron_lm(tmp_path: Path) -> None:
    """Padding of 512 rows becomes one of 504, and the embedding is the output layer."""
    model = {"tensor_model_parallel_size": 2, "untie_embeddings_and_output_weights": False}
    config = jobs.small_config(tmp_path, model)
    batch = next(_batches(config))
    ours, _ = run_ranks(_save_and_go_on, 2, config, batch["tokens"])[0]
    place = megatron_lm.where(tmp_path / "run" / "checkpoints", "--make-vocab-size-divisible-by", "7")
    real = slice(0, jobs.VOCABULARY)
    for flag, first in (("--finetune", 0), ("--no-load-optim", 2)):
        ((iteration, theirs, _),) = run_ranks(_load_and_go_on, 1, (*place, flag), [batch])
        assert iteration == first
        torch.testing.assert_close(theirs[..., real], ours[..., real], rtol=1e-5, atol=1e-5)


def _write_bf16(flags: tuple[str, ...], batch: Batch) -> None:
    peer = megatron_lm.build(*flags)
    megatron_lm.step(peer, batch)
    megatron_lm.save(peer, 1)


def test_distributed_optimizer_of_megatron_lm(tmp_path: Path) -> None:
    """Entry by entry: without apex or Transformer Engine, Megatron-LM cannot load this form even of its own."""
    config = jobs.small_config(tmp_path, precision={"dtype": "bf16"})
    run_ranks(jobs.steps_then_save, 1, config, 1)
    optimizer = ("--bf16", "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
    flags = megatron_lm.where(tmp_path / "peer", *optimizer, "--make-vocab-size-divisible-by", "128", UNTIED)
    run_ranks(_write_bf16, 1, flags, next(_batches(config)))
    folders = [tmp_path / "run" / "checkpoints" / "iter_0000001", tmp_path / "peer" / "iter_0000001"]
    ours, theirs = (
        {key: (t.global_shape, t.dtype) for key, t in load_tensors_metadata(str(folder)).items()} for folder in folders
    )
    assert ours == theirs
    commons = [load_common_state_dict(str(folder)) for folder in folders]
    for common in commons:
        del common["args"], common["num_floating_point_operations_so_far"]
    assert commons[0] == commons[1]
