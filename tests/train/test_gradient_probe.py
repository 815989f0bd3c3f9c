"""The probe of domain and general gradients: right in every layout, and without a trace in training."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megacpt.config.load import config_from
from megacpt.errors import UserError
from megacpt.train.planning import make_plan
from tests.jobs import start
from tests.ranks import run_ranks
from tests.train import tiny

STEPS = 3
PROBE = {"diagnostics": {"gradient_probe": {"every": 1, "domain": ["medical"]}}}
FLAGS = ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
CONTEXT: tiny.Tree = {"model": {"context_parallel_size": 2}}
LAYOUTS: dict[str, tuple[int, tiny.Tree]] = {
    "one": (1, tiny.layout()),
    "tp2": (2, tiny.layout(tp=2, sp=True)),
    "vp2": (2, tiny.layout(pp=2, vp=2)),
    "dp2": (2, tiny.layout()),
    "dp2_overlap": (2, {"optimizer": dict.fromkeys(FLAGS, True)}),
    "tp2pp2": (4, tiny.layout(tp=2, pp=2, distributed=True)),
    "cp2": (2, CONTEXT),
    "cp2dp2": (4, CONTEXT | {"optimizer": {"use_distributed_optimizer": True}}),
}


def configuration(folder: Path, run: str, *changes: tiny.Tree) -> tiny.Tree:
    short: tiny.Tree = {"train": {"train_iters": STEPS, "freeze": {"bottom": 1}}, "eval": {"at": [], "every": None}}
    return tiny.tree(folder, run, short, *changes)


def probes(run: Path) -> dict[int, Any]:
    return {row["iteration"]: row["gradient_probe"] for row in tiny.rows(run) if "gradient_probe" in row}


def by_hand(tree: tiny.Tree) -> list[dict[str, float]]:
    """Gradients of the first batch's two parts, by autograd on the bare model, in its buffers."""
    job = start(config_from(tree, "test"))
    (model,) = job.chunks
    batches = job.next_batch()
    batch = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
    positions = torch.arange(batch["tokens"].shape[1]).expand_as(batch["tokens"])
    medical = (batch["source"] == job.sources.index("medical"))[:, None] * batch["loss_mask"]
    parts = []
    layers = [list(layer.parameters()) for layer in model.decoder.layers[1:]]
    for mask in (medical, batch["loss_mask"] - medical):
        losses = model(batch["tokens"], positions, None, labels=batch["labels"])
        job.wrapped[0].zero_grad_buffer()
        ((losses * mask).sum() / mask.sum()).backward()
        parts.append([torch.cat([p.main_grad.double().flatten() for p in layer]) for layer in layers])
    return [
        {
            "layer": layer,
            "cosine": float(torch.nn.functional.cosine_similarity(a, b, dim=0)),
            "domain_norm": float(a.norm()),
            "general_norm": float(b.norm()),
        }
        for layer, (a, b) in enumerate(zip(*parts, strict=True), start=1)
    ]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    tiny.write_corpora(folder)
    return folder


@pytest.fixture(scope="module")
def expected(corpora: Path) -> list[dict[str, float]]:
    return run_ranks(by_hand, 1, configuration(corpora, "by_hand"))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_probe_is_right_and_leaves_no_trace(corpora: Path, expected: list[dict[str, float]], name: str) -> None:
    world, layout = LAYOUTS[name]
    for run, changes in ((f"{name}_plain", []), (name, [PROBE])):
        run_ranks(tiny.train_here, world, configuration(corpora, run, layout, *changes), world)
    training = [row for row in tiny.rows(corpora / name) if "gradient_probe" not in row]
    assert training == tiny.rows(corpora / f"{name}_plain")
    found = probes(corpora / name)
    assert sorted(found) == [1, 2, 3]
    assert found[1][0] == {"layer": 0, "cosine": None, "domain_norm": 0.0, "general_norm": 0.0}
    for layer, told in zip(found[1][1:], expected, strict=True):
        assert layer == pytest.approx(told, rel=2e-5)


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        ({"every": 1}, "name the domain"),
        ({"every": 1, "domain": ["medical", "general"]}, "name the domain"),
        ({"domain": ["law"]}, "no source 'law'; data has medical, general"),
    ],
)
def test_a_domain_is_needed(corpora: Path, probe: dict[str, Any], words: str) -> None:
    tree = configuration(corpora, "never", {"diagnostics": {"gradient_probe": probe}})
    with pytest.raises(UserError, match=words):
        make_plan(config_from(tree, "test"), 1, on_gpu=False)
