"""Training that starts from a Hugging Face folder and leaves Hugging Face folders behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megacpt.config.load import config_from
from megacpt.config.tree import Config
from megacpt.data.tokens.indexed import IndexedDataset
from megacpt.data.tokens.manifest import Manifest, TokenizerInfo, write_manifest
from megacpt.data.tokens.tokenizer import load_tokenizer
from megacpt.errors import UserError
from megacpt.train.__main__ import main
from megacpt.train.planning import make_plan
from tests.jobs import small_config, write_corpus
from tests.model.hf.models import make_model, tensors_of, transformers_logits
from tests.ranks import run_ranks

KIND, VOCABULARY = "tied", 1003


def configuration(folder: Path, run: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run without a single key of shape: the model brings it."""
    tree = small_config(folder, {"vocab_size": VOCABULARY}).model_dump()
    tree["model"] = {}
    tree["train"] |= {"train_iters": 5}
    tree["optimizer"] |= {"lr": 2e-3}
    tree["init"] = {"hf": str(folder / "model")}
    tree["save"] = {"dir": str(folder / run), "hf_every": 5}
    for name, section in sections.items():
        tree[name] = tree[name] | section
    return tree


def train_here(tree: dict[str, Any]) -> list[float]:
    """Run to the end on this rank; losses of the steps, where this rank logs them."""
    from megacpt.train.loop import train
    from tests.jobs import start

    config: Config = config_from(tree, "test")
    job = start(config)
    train(job)
    if job.log is not None:
        job.log.close()
    rows = (Path(config.save.dir) / "metrics.jsonl").read_text().splitlines()
    return [row["lm_loss"] for row in map(json.loads, rows) if "lm_loss" in row]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    make_model(folder / "model", KIND, initializer_range=0.05)
    write_corpus(folder / f"corpus_{VOCABULARY}", VOCABULARY)
    return folder


@pytest.mark.parametrize("key", ["tensor_model", "pipeline_model", "context"])
def test_five_steps_from_a_folder(folder: Path, key: str) -> None:
    run = f"run_{key}"
    tree = configuration(
        folder, run, model={f"{key}_parallel_size": 2}, train={"train_iters": 5, "global_batch_size": 16}
    )
    losses = run_ranks(train_here, 2, tree)[0]
    assert len(losses) == 5
    exported = folder / run / "hf" / "iter_0000005"
    before, after = tensors_of(folder / "model"), tensors_of(exported)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    card = (exported / "README.md").read_text()
    assert "| base model | model |" in card
    assert "| steps | 5 |" in card
    assert "| tokens of walks |" in card

    # The first documents, scored by transformers before and after.
    dataset = IndexedDataset(folder / f"corpus_{VOCABULARY}")
    tokens = torch.tensor([dataset.read(d, 0, 20).tolist() for d in range(60) if dataset.lengths[d] >= 20][:8])
    scores = [
        torch.nn.functional.cross_entropy(
            transformers_logits(place, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        for place in (folder / "model", exported)
    ]
    assert scores[1] < scores[0]

    # The export of a checkpoint is a start like any other, and so is the checkpoint.
    again = configuration(folder, f"{run}_again", init={"hf": str(exported)}, train={"train_iters": 1})
    onwards = configuration(
        folder,
        f"{run}_onwards",
        init={"hf": None, "checkpoint": str(folder / run)},
        train={"train_iters": 1},
    )
    assert run_ranks(train_here, 1, again)[0] == pytest.approx(run_ranks(train_here, 1, onwards)[0], rel=1e-6)
    carried = folder / f"{run}_onwards" / "checkpoints" / "iter_0000001" / "hf" / "base.json"
    assert json.loads(carried.read_text()) == {"base": "model"}


def test_an_export_that_a_stopped_run_owes(folder: Path) -> None:
    tree = configuration(folder, "owing", train={"train_iters": 2}, save={"dir": str(folder / "owing"), "hf_every": 2})
    run_ranks(train_here, 1, tree)
    exported = folder / "owing" / "hf" / "iter_0000002"
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    shutil.rmtree(exported)
    run_ranks(train_here, 1, tree)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"hidden_size": 64}}, ["model.hidden_size 64, but", "config.json has 48"]),
        ({"model": {"preset": "tiny"}}, ["model.preset tiny has", "drop the key"]),
        ({"init": {"hf": "nowhere"}}, ["nowhere: no such folder"]),
        ({"model": {"pipeline_model_parallel_size": 3}}, ["num_layers 4"]),
    ],
)
def test_refusals(
    folder: Path,
    tmp_path: Path,
    change: dict[str, Any],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree = configuration(folder, "never", **change)
    arguments = ["--config", str(tmp_path / "config.yaml"), "--dry-run", "--world-size", "3"]
    tree["train"]["global_batch_size"] = 12
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (folder / "never").exists()


def test_tokens_of_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    corpus, model = tmp_path / "corpus", tmp_path / "model"
    write_corpus(corpus, VOCABULARY)
    dataset = IndexedDataset(corpus)
    words = {f"word{number}": number for number in range(900)} | {"[UNK]": 900}
    for name in ("model", "other"):
        shutil.copytree(folder / "model", tmp_path / name)
        vocabulary = words if name == "model" else dict(list(words.items())[100:])
        spec = {"added_tokens": [], "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(spec))
    made_by = load_tokenizer("HuggingFaceTokenizer", model / "tokenizer.json")
    info = TokenizerInfo(made_by.type, made_by.sha256, made_by.vocab_size, made_by.eod_id)
    manifest = Manifest("0", [], info, False, "uint16", documents=len(dataset), tokens=dataset.tokens)
    write_manifest(corpus, manifest)
    tree = configuration(folder, "never", init={"hf": str(model)})
    tree["data"]["sources"] = {"walks": {"path": str(corpus), "weight": 1}}
    assert make_plan(config_from(tree, "test"), 1, on_gpu=False).architecture.vocab_size == VOCABULARY
    tree["init"]["hf"] = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"other: its tokenizer .* is not the one that made the datasets"):
        make_plan(config_from(tree, "test"), 1, on_gpu=False)
