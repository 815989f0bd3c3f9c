"""Validation: every target of the set once, whatever the batch size and the layout."""

from pathlib import Path

import pytest

from megacpt.config.load import config_from
from megacpt.data.tokens.indexed import IndexedDataset
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
