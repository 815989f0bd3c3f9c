"""Every configuration in examples/ is one that a run would accept; the large ones are planned, on this CPU."""

import re
from pathlib import Path

import numpy as np
import pytest

from megacpt.config.load import load_config
from megacpt.data.tokens.indexed import write_dataset
from megacpt.train.__main__ import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PLANNED = {"llama3_8b_h200": (1, 139), "llama3_8b_8xh100": (8, 78), "llama3_70b_8nodes": (64, 78)}
"""By name: ranks, and GiB of the card that it is for."""


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_keys_and_types(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize("name", PLANNED)
def test_a_large_example_is_planned_and_fits_its_card(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world, card = PLANNED[name]
    path = EXAMPLES / f"{name}.yaml"
    config = load_config(path)
    monkeypatch.chdir(tmp_path)
    numbers = np.random.default_rng(0)
    for prefix in (*(source.path for source in config.data.sources.values()), *config.eval.sets.values()):
        documents = (numbers.integers(0, 128_000, 3000) for _ in range(20))
        Path(prefix).parent.mkdir(exist_ok=True)
        write_dataset(prefix, np.dtype(np.int32), documents)
    arguments = ["--config", str(path), "--dry-run", "--world-size", str(world), "init.checkpoint=null"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert f"ranks        {world} = " in text
    assert "layers       transformer_engine (model.transformer_impl)" in text
    assert "on a GPU" in text
    (largest,) = re.findall(r"^largest: stage \d+ with ([\d.]+) GiB a rank$", text, re.MULTILINE)
    assert float(largest) < 0.92 * card
