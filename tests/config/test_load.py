"""YAML and overrides into a checked configuration: what is read, and what is refused in one sentence."""

from pathlib import Path

import pytest
import yaml

from megacpt.config.load import dump_config, load_config
from megacpt.errors import UserError

TEXT = """
model: {preset: tiny}
data: {seq_length: 64, sources: {medical: {path: m, epochs: 2}}}
train: {global_batch_size: 8}
optimizer: {lr: 3e-4}
schedule:
save: {dir: runs/x}
"""


def _file(folder: Path, text: str = TEXT) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_numbers_sections_and_overrides(tmp_path: Path) -> None:
    overrides = [
        "train.train_iters=7",
        "optimizer.min_lr=1e-5",
        "data.sources.general={path: g, weight: 1}",
        "eval.at=[0, 3]",
    ]
    config = load_config(_file(tmp_path), overrides)
    assert (config.optimizer.lr, config.optimizer.min_lr, config.train.train_iters) == (3e-4, 1e-5, 7)
    assert config.data.sources["general"].weight == 1.0
    assert config.eval.at == [0, 3]
    assert config.schedule.lr_decay_style == "cosine"


def test_the_resolved_configuration_is_one_again(tmp_path: Path) -> None:
    config = load_config(_file(tmp_path))
    assert load_config(_file(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr=true", ["optimizer.lr", "True"]),
        ("optimizer.lr='3e-4'", ["optimizer.lr", "'3e-4'"]),
        ("optimizer.lr=.inf", ["optimizer.lr", "inf"]),
        ("model.init_method_std=.nan", ["model.init_method_std", "nan"]),
        ("train.global_batch_size=yes", ["train.global_batch_size", "True"]),
        ("train.seed=9223372036854775808", ["train.seed", "less than"]),
        ("save.keep_last=1.5", ["save.keep_last", "1.5"]),
        ("train.train_iter=1", ["unknown key 'train.train_iter'", "'train.train_iters'"]),
        ("train=3.x", ["train"]),
        ("train.seed", ["section.key=value"]),
        ("train.seed.x.y=1", ["train.seed.x"]),
    ],
)
def test_refused_values(tmp_path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        load_config(_file(tmp_path), ["train.seed=1", override])
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TEXT + "save: {dir: y}\n", ["run.yaml, line 8", "'save' stands twice"]),
        (TEXT + "eval:\n\tevery: 3\n", ["run.yaml, line 9", "\\t"]),
        (TEXT + "? [a, b]\n: c\n", ["run.yaml, line 8", "key"]),
        (TEXT + "? {a: b}\n: c\n", ["run.yaml, line 8", "key"]),
        (TEXT + "3: c\n", ["run.yaml", "3"]),
        ("- model\n", ["mapping of sections"]),
        ("", ["mapping of sections"]),
    ],
)
def test_refused_files(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        load_config(_file(tmp_path, text))
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    "example", sorted((Path(__file__).parents[2] / "examples").glob("*.yaml")), ids=lambda p: p.name
)
def test_examples_load(example: Path) -> None:
    config = load_config(example)
    assert yaml.safe_load(dump_config(config))["save"]["dir"] == config.save.dir
