"""Rows that pad the vocabulary take part in nothing, and another layout pads anew."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values

from megacpt.config.tree import Config
from megacpt.model.gpt import LanguageModel
from megacpt.train.job import Job
from megacpt.train.optimizer import sharded_optimizer_state
from tests.jobs import Section, small_config, start, step, steps_then_save
from tests.ranks import run_ranks

TP = "tensor_model_parallel_size"
MODEL: Section = {"vocab_size": 1003, "num_attention_heads": 6, "num_query_groups": 3, "kv_channels": 8}
TIED: Section = {"untie_embeddings_and_output_weights": False}
VOCABULARY_WEIGHTS = ("embedding.word_embeddings.weight", "output_layer.weight")
SAVED_AT = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("padding")


def padding_of(chunk: LanguageModel) -> list[torch.Tensor]:
    """This rank's padding rows of the embedding and the output layer."""
    weights = dict(chunk.named_parameters())
    return [weights[name].detach()[chunk.real_rows :] for name in VOCABULARY_WEIGHTS if name in weights]


def with_huge_padding(config: Config, size: float) -> tuple[list[tuple[float, float]], list[bool], torch.Tensor]:
    """Two steps after the padding rows were set to `size`; whether they kept it; logits of a few tokens."""
    job = start(config)
    (chunk,) = job.chunks
    for rows in padding_of(chunk):
        rows.fill_(size)
    history = [step(job) for _ in range(2)]
    kept = [bool((rows == size).all()) for rows in padding_of(chunk)]
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        return history, kept, chunk(tokens, tokens, None)


@pytest.mark.parametrize("model", [{}, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("tensor_parallel", [1, 3])
def test_padding_takes_part_in_nothing(folder: Path, tensor_parallel: int, model: Section):
    """21 rows of padding at TP 1, 149 at TP 3: all of the last rank's shard but 235 rows."""
    optimizer = {"lr": 3e-3, "weight_decay": 0.0, "clip_grad": 0.5, "adam_eps": 1e-5}
    config = small_config(folder, {**MODEL, **model, TP: tensor_parallel}, optimizer=optimizer)
    zero, huge = (run_ranks(with_huge_padding, tensor_parallel, config, size) for size in (0.0, 1e4))
    rows = 384 if tensor_parallel == 3 else 1024
    for rank, ((history, _, logits), (history_then, kept, logits_then)) in enumerate(zip(zero, huge, strict=True)):
        assert history_then == history
        assert all(kept)
        assert torch.equal(logits_then, logits)
        real = min(max(1003 - rank * rows, 0), rows)
        assert logits.shape[-1] == rows
        assert logits[..., :real].isfinite().all()
        assert logits[..., real:].isneginf().all()


def tensors_of(job: Job) -> dict[str, torch.Tensor]:
    """This rank's weights and moments, by name."""
    state: dict[str, Any] = {"model": job.chunks[0].sharded_state_dict()}
    tensors = {name: weight.detach().clone() for name, weight in job.chunks[0].named_parameters()}
    for shard in nested_values({"optimizer": sharded_optimizer_state(job.optimizer, state, loading=False)}):
        tensors[shard.key] = torch.as_tensor(shard.data).detach().clone()
    return tensors


def resume_and_save(config: Config) -> tuple[dict[str, torch.Tensor], list[bool]]:
    """What a checkpoint holds in this layout, and whether its padding is zero here; saves it again in this layout."""
    job = start(config)
    assert job.progress.iteration == SAVED_AT
    tensors = tensors_of(job)
    job.save()
    padded = [t for name, t in tensors.items() if name.endswith(VOCABULARY_WEIGHTS)]
    return tensors, [not rows[job.chunks[0].real_rows :].any() for rows in padded]


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [({}, {}), (TIED, {}), ({}, {"use_distributed_optimizer": True})],
    ids=["untied", "tied", "untied-sharded"],
)
def test_resharding_pads_anew(folder: Path, tmp_path: Path, model: Section, optimizer: Section):
    """TP 1 -> TP 3 -> TP 1: 1,024 rows, 1,152 rows, 1,024 rows; weights and moments of real rows keep their bits."""

    def config(name: str, tensor_parallel: int) -> Config:
        shape = {**MODEL, **model, TP: tensor_parallel}
        return small_config(folder, shape, optimizer=optimizer, save={"dir": str(tmp_path / name)})

    run_ranks(steps_then_save, 1, config("here", 1), SAVED_AT)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    [(before, _)] = run_ranks(resume_and_save, 1, config("here", 1))
    at_three = run_ranks(resume_and_save, 3, config("there", 3))
    [(after, _)] = run_ranks(resume_and_save, 1, config("there", 1))

    assert all(all(zero) for _, zero in at_three)
    padded = [name for name in before if name.endswith(VOCABULARY_WEIGHTS)]
    assert len(padded) == (3 if model else 6)
    for name in padded:
        whole = torch.cat([tensors[name] for tensors, _ in at_three])
        assert len(whole) == 1152
        assert torch.equal(whole[:1003], before[name][:1003])
        assert before[name][:1003].any()
        assert not before[name][1003:].any()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
