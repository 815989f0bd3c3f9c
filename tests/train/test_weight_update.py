"""Distance from the weights of iteration 0: equal to what two exported folders say, in every layout and on resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megacpt.config.load import config_from
from megacpt.errors import UserError
from megacpt.train.memory import Setting, base_weights_bytes
from megacpt.train.planning import make_plan
from tests.jobs import small_config, start, write_corpus
from tests.model.hf.models import make_model, tensors_of
from tests.ranks import run_ranks
from tests.train import tiny
from tests.train.test_hf import train_here

KIND, VOCABULARY, LAYERS, STEPS = "tied", 1003, 4, 3


def configuration(folder: Path, run: str, *changes: tiny.Tree) -> tiny.Tree:
    tree = small_config(folder, {"vocab_size": VOCABULARY}).model_dump()
    tree["model"] = {"tensor_model_parallel_size": 1}
    tree["train"] |= {"train_iters": STEPS}
    tree["init"] = {"hf": str(folder / "model"), "gate": False}
    tree["save"] = {"dir": str(folder / run), "interval": 1, "hf_every": STEPS}
    tree["diagnostics"] = {"weight_update": {"at": [1], "every": STEPS, "layers": 1}}
    for change in changes:
        for section, keys in change.items():
            tree[section] |= keys
    return tree


def from_folders(before: Path, after: Path) -> list[dict[str, float]]:
    """Per layer the two ratios, from Hugging Face tensors alone; a run in bf16 begins from rounded ones."""
    old, new = tensors_of(before), tensors_of(after)
    old = {name: tensor.to(new[name].dtype) for name, tensor in old.items()}
    found = []
    for layer in range(LAYERS):
        names = [name for name in old if f".layers.{layer}." in name]
        w0 = torch.cat([old[name].double().flatten() for name in names])
        change = torch.cat([new[name].double().flatten() for name in names]) - w0
        moved = (change[w0 != 0] / w0[w0 != 0]).abs().mean()
        found.append({"mean_ratio": float(moved), "norm_ratio": float(change.norm() / w0.norm())})
    return found


def refusal(tree: tiny.Tree) -> str:
    with pytest.raises(UserError) as caught:
        tiny.train_here(tree, 1)
    return str(caught.value)


def updates(run: Path) -> dict[int, dict[str, Any]]:
    return {row["iteration"]: row for row in tiny.rows(run) if "weight_update" in row}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("update")
    make_model(folder / "model", KIND, initializer_range=0.05)
    write_corpus(folder / f"corpus_{VOCABULARY}", VOCABULARY)
    return folder


@pytest.mark.parametrize(
    ("name", "world", "changes"),
    [
        ("tp2pp2", 4, tiny.layout(tp=2, pp=2, sp=True, distributed=True)),
        ("vp2", 2, tiny.layout(pp=2, vp=2)),
        ("dp2", 2, tiny.layout(distributed=True) | {"train": {"freeze": {"bottom": 1}}}),
        ("dp2_bf16", 2, tiny.layout(distributed=True) | {"precision": {"dtype": "bf16"}}),
        (
            "dp2_overlap",
            2,
            {
                "optimizer": dict.fromkeys(
                    ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"), True
                )
            },
        ),
    ],
)
def test_numbers_are_those_of_two_folders(folder: Path, name: str, world: int, changes: tiny.Tree) -> None:
    run_ranks(train_here, world, configuration(folder, name, changes))
    rows = updates(folder / name)
    assert sorted(rows) == [1, STEPS]
    expected = from_folders(folder / "model", folder / name / "hf" / f"iter_{STEPS:07d}")
    row = rows[STEPS]
    for layer, (found, told) in enumerate(zip(row["weight_update"], expected, strict=True)):
        assert found == {"layer": layer} | {key: pytest.approx(value, rel=1e-5) for key, value in told.items()}
    top, bottom = expected[-1], expected[0]
    assert row["top"] == {"layers": 1} | {key: pytest.approx(value, rel=1e-5) for key, value in top.items()}
    assert row["bottom"] == {"layers": 1} | {key: pytest.approx(value, rel=1e-5) for key, value in bottom.items()}
    assert row["ratio"]["mean"] == pytest.approx(bottom["mean_ratio"] / top["mean_ratio"], rel=1e-5)
    assert row["ratio"]["norm"] == pytest.approx(bottom["norm_ratio"] / top["norm_ratio"], rel=1e-5)
    assert (bottom["mean_ratio"] == 0) == ("freeze" in changes.get("train", {}))


def kept_bytes(tree: tiny.Tree) -> int:
    job = start(config_from(tree, "test"))
    assert job.base is not None
    return sum(values.nbytes for values in job.base.values)


@pytest.mark.parametrize("context", [1, 2])
def test_the_dry_run_knows_what_is_kept(folder: Path, context: int) -> None:
    layout = {"model": {"tensor_model_parallel_size": 2, "context_parallel_size": context}}
    tree = configuration(folder, f"kept{context}", layout, {"precision": {"dtype": "bf16"}})
    found = run_ranks(kept_bytes, 4, tree)
    plan = make_plan(config_from(tree, "test"), 4, on_gpu=False)
    assert max(found) == base_weights_bytes(Setting(plan.config, plan.architecture, plan.layout, plan.dtype))
    assert sum(found) == 2 * plan.architecture.num_layers * plan.architecture.layer_parameters


def test_a_resumed_run_measures_from_its_beginning(tmp_path: Path) -> None:
    tiny.write_corpora(tmp_path)
    common = {
        "diagnostics": {"weight_update": {"every": 2}},
        "eval": {"at": [], "every": None},
        "train": {"train_iters": 2},
    }
    base = tiny.tree(tmp_path, "base", common)
    run_ranks(tiny.train_here, 1, base, 1)
    onwards = {"init": {"checkpoint": str(tmp_path / "base")}, "save": {"interval": 2}}
    sharded: tiny.Tree = {"optimizer": {"use_distributed_optimizer": True}}
    for name, tree, move in (
        ("fresh", tiny.tree(tmp_path, "fresh", common), sharded),
        ("onwards", tiny.tree(tmp_path, "onwards", common, onwards), {"model": {"context_parallel_size": 2}}),
    ):
        whole = json.loads(json.dumps(tree))
        whole["save"]["dir"] += "_whole"
        for part in (tree, whole):
            part["train"]["train_iters"] = 4
        run_ranks(tiny.train_here, 1, whole, 1)
        tree["save"]["interval"] = 2
        run_ranks(tiny.train_here, 1, tree, 1)
        checkpoints = tmp_path / name / "checkpoints"
        (checkpoints / "latest_checkpointed_iteration.txt").write_text("2\n")
        moved = tree | {section: tree[section] | keys for section, keys in move.items()}
        run_ranks(tiny.train_here, 2, moved, 2)
        found, expected = updates(tmp_path / name), updates(tmp_path / f"{name}_whole")
        assert sorted(found) == sorted(expected) == [2, 4]
        for iteration in found:
            for kind in ("top", "bottom"):
                assert found[iteration][kind] == pytest.approx(expected[iteration][kind], rel=1e-4)

    # What the run began from is gone, or is not what it was: said, not measured against.
    (tmp_path / "onwards" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2\n")
    record = tmp_path / "onwards" / "base_weights.json"
    noted = json.loads(record.read_text())
    assert noted["from"].endswith("base/checkpoints/iter_0000002")
    record.write_text(json.dumps(noted | {"layer_norms": [norm + 1e-3 for norm in noted["layer_norms"]]}))
    shutil.move(tmp_path / "base", tmp_path / "away")
    assert "are gone; restore them" in run_ranks(refusal, 1, tree)[0]
    shutil.move(tmp_path / "away", tmp_path / "base")
    assert "are not those that this run began from" in run_ranks(refusal, 1, tree)[0]
