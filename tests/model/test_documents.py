"""Attention kept inside documents: a packed sample is worth what its documents are alone, in every layout."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megacpt.config.tree import Config
from megacpt.data.samples.batches import collate
from megacpt.data.samples.blended import Sample
from megacpt.model.forward import run_batches, stage_reads_batches
from tests.jobs import NEOX, SEQ_LENGTH, VOCABULARY, Section, relative_difference, small_config, start, train_steps
from tests.ranks import run_ranks

CP, TP, PP = "context_parallel_size", "tensor_model_parallel_size", "pipeline_model_parallel_size"
INSIDE = {"reset_attention_mask": True, "reset_position_ids": True}
LENGTHS = (7, 1, 12, 5)
"""Documents of one sample; together SEQ_LENGTH + 1 tokens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents")


def config_of(folder: Path, layout: Section, inside: bool) -> Config:
    """Like all small runs, with or without attention inside documents."""
    config = small_config(folder, layout)
    return config.model_copy(update={"data": config.data.model_copy(update=INSIDE if inside else {})})


def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, VOCABULARY, length) for length in LENGTHS]


def packed_samples() -> list[Sample]:
    """The sample that holds every document, once per document: the k-th counts only targets inside document k."""
    tokens, segments = np.concatenate(documents()), np.repeat(np.arange(len(LENGTHS), dtype=np.int32), LENGTHS)
    inside = segments[:-1] == segments[1:]
    return [Sample(tokens, inside & (segments[1:] == k), segments, k) for k in range(len(LENGTHS))]


def lone_samples() -> list[Sample]:
    """Each document as a sample of its own, then padding."""
    samples = []
    for number, document in enumerate(documents()):
        tokens = np.zeros(SEQ_LENGTH + 1, np.int64)
        tokens[: len(document)] = document
        segments = (np.arange(SEQ_LENGTH + 1) >= len(document)).astype(np.int32)
        samples.append(Sample(tokens, np.arange(SEQ_LENGTH) < len(document) - 1, segments, number))
    return samples


def losses_of(config: Config, samples: list[Sample]) -> torch.Tensor:
    """Summed loss and targets of each sample, float64 [2, samples], one sample a micro-batch."""
    job = start(config)
    inside = config.data.reset_attention_mask
    reads = stage_reads_batches(inside)
    batches = [collate([sample], inside) if reads else {} for sample in samples]
    with torch.no_grad():
        return run_batches(job.wrapped, batches, len(samples), (1, SEQ_LENGTH), train=False)


@pytest.fixture(scope="module")
def alone(folder: Path) -> torch.Tensor:
    """What each document costs alone, with neither mask nor restarted positions."""
    return run_ranks(losses_of, 1, config_of(folder, {}, False), lone_samples())[0]


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(1, {}, id="one-rank"),
        pytest.param(2, {TP: 2, "sequence_parallel": True}, id="tp2-sp"),
        pytest.param(2, {PP: 2}, id="pp2"),
        pytest.param(4, {PP: 4}, id="pp4"),
        pytest.param(2, {CP: 2}, id="cp2"),
        pytest.param(
            1,
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
            id="recompute",
        ),
    ],
)
def test_packed_equals_alone(folder: Path, alone: torch.Tensor, world: int, layout: Section):
    assert alone[1].tolist() == [length - 1 for length in LENGTHS]
    for packed in run_ranks(losses_of, world, config_of(folder, layout, True), packed_samples()):
        torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)


def test_packed_equals_alone_where_part_of_a_head_rotates(folder: Path):
    [alone] = run_ranks(losses_of, 1, config_of(folder, NEOX, False), lone_samples())
    layout = {**NEOX, TP: 2, "sequence_parallel": True}
    for packed in run_ranks(losses_of, 2, config_of(folder, layout, True), packed_samples()):
        torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)


def test_without_the_mask_documents_see_one_another(folder: Path, alone: torch.Tensor):
    [packed] = run_ranks(losses_of, 1, config_of(folder, {}, False), packed_samples())
    assert packed[0, 0] == pytest.approx(float(alone[0, 0]), rel=1e-6)
    assert all(abs(packed[0, k] / alone[0, k] - 1) > 1e-3 for k in (2, 3))


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(2, {TP: 2, "sequence_parallel": True}, id="tp2-sp"),
        pytest.param(4, {PP: 4}, id="pp4"),
        pytest.param(2, {PP: 2, "virtual_pipeline_model_parallel_size": 2}, id="pp2-vp2"),
        pytest.param(4, {CP: 2, PP: 2}, id="cp2-pp2"),
    ],
)
def test_training_agrees(folder: Path, world: int, layout: Section):
    [expected] = run_ranks(train_steps, 1, config_of(folder, {}, True))
    for history in run_ranks(train_steps, world, config_of(folder, layout, True)):
        assert relative_difference(history, expected) < 2e-6


def phases_of(config: Config, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary phases [s, b, 1, d] that the first stage hands to its layers, and the batch's positions [b, s]."""
    (chunk,) = start(config).chunks
    batch = collate(samples, True)
    phases = chunk._preprocess(batch["tokens"], batch["position_ids"])[1]
    return phases, batch["position_ids"]


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_rotary_phases_restart(folder: Path, tensor_parallel: int):
    layout = {TP: tensor_parallel, "sequence_parallel": tensor_parallel > 1}
    samples = [packed_samples()[0], *lone_samples()[:2]]
    expected = [[*range(7), 0, *range(12), *range(4)], [*range(7), *range(17)], [0, *range(23)]]
    inverse = 10_000.0 ** -(torch.arange(0, 12, 2) / 12)
    for phases, positions in run_ranks(phases_of, tensor_parallel, config_of(folder, layout, True), samples):
        assert positions.tolist() == expected
        angles = torch.tensor(expected).t()[..., None] * inverse
        torch.testing.assert_close(phases[:, :, 0], torch.cat([angles, angles], -1), rtol=1e-6, atol=1e-6)
