"""megatron-core is loaded without torch's compiler on a CPU, and with it where there is a GPU."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megacpt.runtime.compiler import load_megatron_core
from tests.conftest import REPOSITORY

PACKAGE = """
import torch
jit_fuser = torch.compile
plain = lambda x: x + 1
bare, with_options = torch.compile(plain), torch.compile(dynamic=True)(plain)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of megatron-core's name that compiles as it is imported, in the place of the real one."""
    folder = tmp_path / "megatron" / "core"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
            del sys.modules[name]
        yield folder / "__init__.py"


@pytest.mark.parametrize("gpus", [0, 1])
def test_functions_are_compiled_only_where_there_is_a_gpu(
    package: Path, monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    def compiled(function=None, **options):
        return (lambda function: ("compiled", options)) if function is None else ("compiled", {})

    package.write_text(PACKAGE)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch, "compile", compiled)
    load_megatron_core()
    core = sys.modules["megatron.core"]
    if gpus:
        assert (core.bare, core.with_options) == (("compiled", {}), ("compiled", {"dynamic": True}))
        assert core.jit_fuser is compiled
    else:
        assert core.bare is core.with_options is core.plain is core.jit_fuser(core.plain)
    assert torch.compile is compiled


def test_a_failed_import_leaves_torch_as_it_was(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package.write_text("raise ImportError('broken')")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    before = torch.compile
    with pytest.raises(ImportError, match="broken"):
        load_megatron_core()
    assert torch.compile is before


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the compiler is wanted")
@pytest.mark.parametrize("command", ["-m megacpt.train --dry-run", "tools/plan.py"])
def test_a_command_that_trains_nothing_loads_no_compiler(tmp_path: Path, command: str) -> None:
    """A plan finds a file missing: by then megatron-core is loaded, and Python lists what it imports."""
    config = tmp_path / "config.yaml"
    config.write_text(
        "{model: {preset: tiny}, data: {seq_length: 8, sources: {a: {path: absent, epochs: 1}}}, "
        "train: {global_batch_size: 1}, optimizer: {lr: 1.0}, save: {dir: run}}"
    )
    words = [sys.executable, "-X", "importtime", *command.split(), "--config", str(config)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 2, done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "error: absent.idx: no such file" in done.stderr
    assert "megatron.core" in loaded
    assert not loaded & {"torch._dynamo", "torch._inductor.compile_fx"}
