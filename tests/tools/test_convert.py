"""tools/convert.py on real folders: there and back, and what it says of folders that are damaged."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.commands import forked
from tests.conftest import REPOSITORY
from tests.model.hf.models import make_model, tensors_of

TOOL = REPOSITORY / "tools" / "convert.py"
UP = "model.layers.2.mlp.up_proj.weight"
WORDS = {f"word{number}": number for number in range(1003)} | {"[UNK]": 1003}
TOKENIZER = {"added_tokens": [], "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "[UNK]"}}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("healthy") / "model", "llama3")


def convert(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """The tool as it is started, by torchrun for several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"]
        launcher += ["--rdzv-endpoint", "localhost:0"]
    command = [*launcher, str(TOOL), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)


def test_there_on_two_ranks_and_back_on_one(healthy: Path, tmp_path: Path) -> None:
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "output"
    parallel = ("--tensor-model-parallel-size", 2)
    imported = convert("import", "--hf", healthy, "--output", checkpoint, *parallel, ranks=2)
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.count("gate passed") == 1
    exported = convert("export", "--checkpoint", checkpoint, "--output", output)
    assert exported.returncode == 0, exported.stderr
    source, found = tensors_of(healthy), tensors_of(output)
    assert source.keys() == found.keys()
    assert all(torch.equal(source[name], found[name]) for name in source)
    assert json.loads((output / "config.json").read_text())["vocab_size"] == 1003
    assert (output / "model.safetensors").stat().st_mode & 0o044
    again = forked(TOOL, "export", "--checkpoint", checkpoint, "--output", output)
    assert again.returncode == 2
    assert again.stderr == f"error: {output}: already there; choose another --output or remove it\n"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of the file that holds layer 2's up projection."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][UP]
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (config | changes).items() if value != "gone"}))


def cut_short(folder: Path) -> None:
    path = folder / "model-00002-of-00005.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def to_pickle(folder: Path, extra: object = None, archive: bool = True) -> None:
    """The model as pytorch_model.bin, with or without an object that is no tensor; in torch's old format as well."""
    tensors: dict[str, Any] = tensors_of(folder)
    for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink()
    held = tensors if extra is None else tensors | {"extra": extra}
    torch.save(held, folder / "pytorch_model.bin", _use_new_zipfile_serialization=archive)


def bits(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP].to(torch.int8)


def transposed(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP].t().contiguous()


BROKEN: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop(UP)), [UP, "is missing", "the index promises it"]),
    "extra tensor": (
        lambda f: rewrite(f, lambda t: t.update({"model.layers.2.adapter": torch.ones(2)})),
        ["model.layers.2.adapter", "none of LlamaForCausalLM's"],
    ),
    "wrong shape": (lambda f: rewrite(f, transposed), [UP, "shape [48, 112]", "asks for [112, 48]"]),
    "wrong dtype": (lambda f: rewrite(f, bits), [UP, "type I8"]),
    "truncated": (cut_short, ["model-00002-of-00005.safetensors: truncated"]),
    "missing file": (
        lambda f: (f / "model-00003-of-00005.safetensors").unlink(),
        ["model-00003-of-00005.safetensors: no such file", "names it"],
    ),
    "field": (lambda f: change_config(f, rms_norm_eps="gone"), ["config.json: field rms_norm_eps is missing"]),
    "layers": (lambda f: change_config(f, num_hidden_layers=5), ["model.layers.4.", "is missing from its 5 files"]),
    "architecture": (
        lambda f: change_config(f, architectures=["MixtralForCausalLM"]),
        ["config.json: architecture MixtralForCausalLM is not supported"],
    ),
    "tokenizer": (
        lambda f: (f / "tokenizer.json").write_text(json.dumps(TOKENIZER)),
        ["tokenizer.json: the tokenizer has 1,004 tokens", "the embedding 1,003 rows"],
    ),
    "pickle": (
        lambda f: to_pickle(f, extra=subprocess.Popen),
        ["pytorch_model.bin: a pickle that holds more than tensors"],
    ),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], ["holds no weights"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_gets_a_sentence(
    name: str,
    healthy: Path,
    tmp_path: Path,
    load_tool: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(healthy, folder)
    damage, words = BROKEN[name]
    damage(folder)
    capsys.readouterr()
    assert load_tool("convert").main(["import", "--hf", str(folder), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder}")
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_of_tensors_is_read(healthy: Path, tmp_path: Path, archive: bool) -> None:
    from megacpt.model.hf.source import Source

    folder = tmp_path / "model"
    shutil.copytree(healthy, folder)
    before = Source(folder)
    to_pickle(folder, archive=archive)
    after = Source(folder)
    assert before.tensors.keys() == after.tensors.keys()
    part = (slice(3, 9), slice(0, 7))
    expected = tensors_of(healthy)[UP][part]
    assert torch.equal(after.read(UP, part), expected)
    assert torch.equal(Source(healthy).read(UP, part), expected)


def test_layouts_that_do_not_divide(
    healthy: Path, tmp_path: Path, load_tool: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    main = load_tool("convert").main
    arguments = ["import", "--hf", str(healthy), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--pipeline-model-parallel-size", "3"]) == 2
    assert "cannot be divided into TP 1 x PP 3" in capsys.readouterr().err
    assert main(["export", "--checkpoint", str(healthy), "--output", str(tmp_path / "out")]) == 2
    assert "no checkpoint there" in capsys.readouterr().err


def test_without_transformers_the_gate_says_so(
    healthy: Path,
    tmp_path: Path,
    load_tool: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert load_tool("convert").main(["import", "--hf", str(healthy), "--output", str(tmp_path / "out")]) == 2
    assert "transformers, which is not installed; pip install 'megacpt[hf]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_gate_a_warning(healthy: Path, tmp_path: Path) -> None:
    imported = forked(TOOL, "import", "--hf", healthy, "--output", tmp_path / "out", "--no-gate", "--dtype", "bf16")
    assert imported.returncode == 0, imported.stderr
    assert "warning: NO GATE" in imported.stderr
    assert "gate passed" not in imported.stdout
    small = ("--shard-gb", "0.0001")
    exported = forked(TOOL, "export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf", *small)
    assert exported.returncode == 0, exported.stderr
    source, found = tensors_of(healthy), tensors_of(tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert all(torch.equal(source[name].bfloat16(), found[name]) for name in source)
