import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from megacpt.config.load import load_config
from megacpt.data.mixture.ledger import table
from megacpt.data.samples.blended import BlendedDataset
from megacpt.train.planning import make_plan
from tests.train import tiny


@pytest.fixture(scope="module")
def plan(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("plan")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    tiny.write_corpora(folder)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tiny.tree(folder, "run", tiny.passes(folder))))
    return path


def test_the_plan_is_what_the_sampler_gives(plan: ModuleType, config: Path, capsys: Any, tmp_path: Path):
    assert plan.main(["--config", str(config), "--json", str(tmp_path / "plan.json")]) == 0
    printed = capsys.readouterr().out
    made = make_plan(load_config(config), 1, on_gpu=False)
    assert table(made.mixture) in printed
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["steps"], found["samples"], found["tokens"]) == (32, 256, 256 * 32)
    blend = BlendedDataset(made.mixture, made.corpora, tiny.VOCABULARY)
    counted: dict[tuple[str, str], int] = {}
    for k in range(256):
        sample = blend.sample(k)
        key = str(k // 64 + 1), made.mixture.sources[sample.source].name
        counted[key] = counted.get(key, 0) + int(sample.valid.sum())
    assert {(e["name"], e["source"]): e["tokens"] for e in found["passes"]} == counted
    assert "not read:" in printed


def test_overrides_and_mistakes(plan: ModuleType, config: Path, capsys: Any):
    assert plan.main(["--config", str(config), "data.mixture.passes=1"]) == 0
    assert "passes: 1 of 64 samples" in capsys.readouterr().out
    assert plan.main(["--config", str(config), "data.mixture.pass_tokens=100K"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data.sources.general: a pass of the mixture takes 24,992 tokens of it, but it has ")
    content = config.read_bytes()
    for options, message in [
        (["--json", str(config)], f"error: {config}: is read by this command"),
        (["--world-size", "0"], "error: --world-size 0: "),
        (["--world-size", "-2"], "error: --world-size -2: "),
    ]:
        assert plan.main(["--config", str(config), *options]) == 2
        assert capsys.readouterr().err.startswith(message)
    assert config.read_bytes() == content
