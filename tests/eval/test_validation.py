"""Validation: every target of the set once, whatever the batch size and the layout; errors are survived together."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megacpt.config.load import config_from
from megacpt.data.samples.blended import EvalSet, Sample
from megacpt.data.tokens.indexed import IndexedDataset, write_dataset
from megacpt.data.tokens.manifest import Manifest, TokenizerInfo, manifest_path, write_manifest
from megacpt.eval.statistics import estimate
from megacpt.eval.validation import Validation
from megacpt.train.metrics import validation_row
from tests.jobs import small_config, start, write_corpus
from tests.model.hf.models import make_model, transformers_logits
from tests.ranks import run_ranks
from tests.train import tiny

ITERS = 1000
"""More global batches than the sets hold, so that all of each set is read."""


def validate(tree: tiny.Tree, world: int) -> dict[str, tuple[float, int]]:
    """Loss and tokens of each set under fresh weights."""
    from megacpt.eval.validation import evaluate
    from megacpt.runtime.setup import setup
    from megacpt.train.build import build_job
    from megacpt.train.planning import make_plan

    config = config_from(tree, "test")
    plan = make_plan(config, world, on_gpu=False)
    job = build_job(plan, setup(plan.layout, config.train.seed, config.runtime.threads))
    found = {}
    for name, eval_set in plan.eval_sets.items():
        result = evaluate(job.wrapped, eval_set, job.batch_layout, config.data.seq_length, documents=False)
        found[name] = (result.loss, result.tokens)
    assert all(chunk.training for chunk in job.wrapped)
    return found


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    tiny.write_corpora(folder)
    return folder


def test_every_target_counts_once_in_any_batch_and_layout(corpora: Path) -> None:
    results = []
    for world, size, micro, layout in (
        (1, 8, 2, tiny.layout()),
        (1, 3, 1, tiny.layout()),
        (2, 14, 7, tiny.layout()),
        (2, 4, 2, tiny.layout(tp=2)),
        (2, 4, 2, tiny.layout(pp=2)),
        (2, 4, 2, {"model": {"context_parallel_size": 2}}),
    ):
        batches = {"train": {"global_batch_size": size, "micro_batch_size": micro}, "eval": {"iters": ITERS}}
        ranks = run_ranks(validate, world, tiny.tree(corpora, f"validation{len(results)}", layout, batches), world)
        assert all(rank == ranks[0] for rank in ranks)
        results.append(ranks[0])
    for name in ("medical", "general"):
        targets = IndexedDataset(corpora / f"{name}_valid").tokens - 1
        assert {result[name][1] for result in results} == {targets}
        for result in results:
            assert result[name][0] == pytest.approx(results[0][name][0], rel=1e-6)


def accuracy_of_set(tree: tiny.Tree) -> tuple[Validation, np.ndarray, np.ndarray]:
    """What the live model says of the set "held_out", and of its samples the tokens, and which targets count."""
    from megacpt.eval.validation import evaluate

    job = start(config_from(tree, "test"))
    eval_set = job.plan.eval_sets["held_out"]
    found = evaluate(job.wrapped, eval_set, job.batch_layout, job.plan.mixture.seq_length, documents=False)
    samples = [eval_set.sample(k) for k in range(len(eval_set))]
    return found, np.stack([sample.tokens for sample in samples]), np.stack([sample.valid for sample in samples])


def test_accuracy_is_that_of_transformers(tmp_path: Path) -> None:
    vocabulary = 1003
    make_model(tmp_path / "model", "tied", initializer_range=0.005)
    write_corpus(tmp_path / f"corpus_{vocabulary}", vocabulary)
    # The tied model, hardly more than its embedding, likes to repeat a token: so does the text.
    rng = np.random.default_rng(1)
    texts = [np.repeat(rng.integers(0, vocabulary, size), 2).astype(np.uint16) for size in rng.integers(5, 30, 12)]
    write_dataset(tmp_path / "held_out", np.dtype(np.uint16), texts)
    tree = small_config(tmp_path, {"vocab_size": vocabulary}).model_dump()
    tree["init"] = {"hf": str(tmp_path / "model"), "gate": False}
    tree["eval"] = {"sets": {"held_out": str(tmp_path / "held_out")}}
    layouts = {
        "one": (1, tiny.layout()),
        "tp2": (2, tiny.layout(tp=2)),
        "pp2": (2, tiny.layout(pp=2)),
        "vp2": (2, tiny.layout(pp=2, vp=2)),
        "tp2pp2": (4, tiny.layout(tp=2, pp=2, sp=True)),
        "dp2": (2, tiny.layout()),
        "cp2tp2": (4, {"model": {"context_parallel_size": 2, "tensor_model_parallel_size": 2}}),
    }
    results: dict[str, Validation] = {}
    for name, (world, layout) in layouts.items():
        ranks = run_ranks(accuracy_of_set, world, tree | {"model": layout["model"]})
        assert all(np.array_equal(found.samples, ranks[0][0].samples) for found, *_ in ranks)
        results[name], tokens, counted = ranks[0]

    inputs, targets = torch.from_numpy(tokens[:, :-1]), torch.from_numpy(tokens[:, 1:])
    logits = transformers_logits(tmp_path / "model", inputs)
    valid = torch.from_numpy(counted)
    assert valid.sum() == IndexedDataset(tmp_path / "held_out").tokens - 1
    hits = ((logits.argmax(-1) == targets) & valid).sum(1)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    for result in results.values():
        assert result.samples[:, 1].tolist() == hits.tolist()
        assert result.samples[:, 2].tolist() == valid.sum(1).tolist()
        assert result.samples[:, 0] == pytest.approx((losses * valid).sum(1).numpy(), rel=1e-5)
        assert result.accuracy == int(hits.sum()) / int(valid.sum())
    assert intervals(results["one"]) == intervals(results["dp2"])
    assert 0.1 < results["one"].accuracy < 0.9


def intervals(result: Validation) -> tuple[Any, Any]:
    measures = result.measures()
    return estimate([measures["loss"]]), estimate([measures["accuracy"]])


def test_intervals_cover_the_value_and_are_repeatable() -> None:
    rng = np.random.default_rng(3)
    targets = np.full(400, 32.0)
    hits = rng.binomial(32, 0.3, 400).astype(float)
    result = Validation(np.stack([rng.normal(64, 8, 400), hits, targets], axis=1))
    loss, accuracy = intervals(result)
    assert (loss, accuracy) == intervals(result)
    # Standard errors of the means: 8 / 32 / sqrt(400) and sqrt(0.3 * 0.7 / 12800).
    assert loss.high - loss.low == pytest.approx(2 * 1.96 * 0.0125, rel=0.15)
    assert accuracy.high - accuracy.low == pytest.approx(2 * 1.96 * 0.00405, rel=0.15)
    assert loss.low < result.loss < loss.high
    assert accuracy.low < result.accuracy < accuracy.high
    assert intervals(Validation(np.array([[64.0, 8, 32]])))[0].low is None


class Unreadable(EvalSet):
    """A set whose sample `bad` cannot be read."""

    def __init__(self, inner: EvalSet, bad: int) -> None:
        super().__init__(inner.stream, len(inner))
        self.bad = bad

    def sample(self, k: int) -> Sample:
        if k == self.bad:
            raise OSError(f"sample {k} cannot be read")
        return super().sample(k)


def train_with_bad_sets(tree: tiny.Tree) -> int:
    """A run whose first set cannot be read by one data-parallel rank, and whose weights become not-a-number."""
    from megacpt.train.loop import train

    job = start(config_from(tree, "test"))
    job.plan.eval_sets["medical"] = Unreadable(job.plan.eval_sets["medical"], 9)
    train(job)
    for chunk in job.wrapped:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    job.evaluate()
    if job.log is not None:
        job.log.close()
    return job.progress.iteration


@pytest.mark.parametrize(("world", "layout"), [(2, tiny.layout()), (4, tiny.layout(tp=2, pp=2))])
def test_what_cannot_be_evaluated_does_not_end_training(corpora: Path, world: int, layout: tiny.Tree) -> None:
    tree = tiny.tree(
        corpora, f"bad{world}", layout, {"train": {"train_iters": 2}, "eval": {"at": [0, 2], "every": None}}
    )
    assert run_ranks(train_with_bad_sets, world, tree) == [2] * world
    rows = tiny.rows(corpora / f"bad{world}")
    failures = [(r["iteration"], r["evaluation_error"], r["message"]) for r in rows if "evaluation_error" in r]
    unreadable = "sample 9 cannot be read"
    assert failures == [
        (0, "medical", unreadable),
        (2, "medical", unreadable),
        (2, "medical", unreadable),
        (2, "general", "the loss is nan"),
    ]
    assert [r["iteration"] for r in rows if r.get("validation") == "general"] == [0, 2]


def test_bits_per_byte_need_the_bytes(corpora: Path) -> None:
    tree = tiny.tree(corpora, "bytes")
    from megacpt.train.planning import make_plan

    eval_set = make_plan(config_from(tree, "test"), 1, on_gpu=False).eval_sets["medical"]
    result = Validation(np.array([[64.0, 8, 32]] * 2))
    row = validation_row("medical", eval_set, result)
    assert row["bits_per_byte"] is None
    assert row["loss"] == 2.0
    dataset = eval_set.stream.dataset
    manifest = Manifest("0.1.0", [], TokenizerInfo("T", "ab" * 32, 100, None), False, "uint16", json_keys=["text"])
    for tokens, expected in ((dataset.tokens, 2 / math.log(2) / 4), (dataset.tokens + 1, None)):
        write_manifest(dataset.prefix, replace(manifest, tokens=tokens, text_bytes=4 * dataset.tokens))
        assert validation_row("medical", eval_set, result)["bits_per_byte"] == (expected and pytest.approx(expected))
    manifest_path(dataset.prefix).unlink()
