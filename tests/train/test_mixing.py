"""From section data of a configuration to the mixture: what each key does, and what contradicts what."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megacpt.config.load import config_from
from megacpt.config.tree import Config
from megacpt.data.mixture.mixture import Mixture, Start
from megacpt.data.tokens.indexed import write_dataset
from megacpt.errors import UserError
from megacpt.train.mixing import _solve, named_sources, open_corpora, solve_mixture
from megacpt.train.schedule import LRSchedule

GENERAL = ("github", "wikipedia", "books", "arxiv", "stackexchange")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of about 20,000 tokens for every name, and one of 300."""
    path, random = tmp_path_factory.mktemp("corpora"), np.random.default_rng(1)
    for name in ("medical", "web", "code", *GENERAL):
        write_dataset(
            path / name, np.dtype(np.uint16), (random.integers(0, 99, n) for n in random.integers(1, 80, 500))
        )
    write_dataset(path / "small", np.dtype(np.uint16), [np.zeros(300, np.uint16)])
    return path


def config_of(folder: Path, sources: dict[str, Any], train: dict[str, Any] | None = None, **data: Any) -> Config:
    tree = {
        "model": {"preset": "tiny"},
        "data": {
            "seq_length": 16,
            "sources": {name: {"path": str(folder / name), **(keys or {})} for name, keys in sources.items()},
            **data,
        },
        "train": {"global_batch_size": 8, **(train or {})},
        "optimizer": {"lr": 1e-3, "min_lr": 1e-5},
        "save": {"dir": "unused"},
    }
    return config_from(tree, "test")


def mixture_of(config: Config) -> tuple[Mixture, tuple[str, ...]]:
    schedule = LRSchedule(lr=config.optimizer.lr, min_lr=config.optimizer.min_lr, **config.schedule.model_dump())
    return solve_mixture(config, open_corpora(named_sources(config.data)), schedule)


def test_the_paper_s_passes(folder: Path) -> None:
    sources: dict[str, Any] = {"medical": None, **{name: {"redraw": "once"} for name in GENERAL}}
    recipe = {"preset": "llama1", "replace": ["common_crawl", "c4"], "with": "medical"}
    config = config_of(folder, sources, mixture=recipe | {"pass_tokens": "16K", "passes": 4})
    mixture, notes = mixture_of(config)
    assert (mixture.samples, notes) == (4000, ())
    assert mixture.counts == (3280, 180, 180, 180, 100, 80)
    assert [source.redraw for source in mixture.sources] == ["each_pass", *["once"] * 5]


def test_pass_tokens_are_rounded_to_whole_samples(folder: Path) -> None:
    for tokens, samples in ((16 * 100 + 7, 100), (16 * 100 + 8, 101), ("1.6K", 100)):
        mixture, _ = mixture_of(
            config_of(folder, {"web": {"weight": 1.0}}, mixture={"pass_tokens": tokens, "passes": 2})
        )
        assert mixture.samples == 2 * samples


def test_replay_beside_passes_over_the_domain(folder: Path) -> None:
    config = config_of(folder, {"medical": {"epochs": 3}, "web": None}, mixture={"with": "medical", "replay": "10%"})
    mixture, _ = mixture_of(config)
    medical, web = mixture.counts
    assert mixture.epochs(mixture.stop)["medical"] == 3
    assert web == round(medical / 9)


def test_megatron_s_blend_is_sources_with_weights(folder: Path) -> None:
    for blend in (f"0.3 {folder}/web 0.7 {folder}/code", ["0.3", f"{folder}/web", 0.7, f"{folder}/code"]):
        mixture, _ = mixture_of(config_of(folder, {}, {"train_iters": 10}, data_path=blend))
        assert [(source.name, source.weight) for source in mixture.sources] == [("web", 0.3), ("code", 0.7)]


def test_a_phase_begins_at_a_token_or_when_the_rate_has_fallen(folder: Path) -> None:
    sources = {"medical": {"weight": 0.5}, "web": {"weight": 0.5}}
    phases: list[dict[str, Any]] = [
        {"after_tokens": 1601, "weights": {"medical": 0.9, "web": 0.1}},
        {"when_lr_below": "20%", "weights": {"medical": 1.0}},
    ]
    config = config_of(folder, sources, {"train_iters": 50}, phases=phases)
    mixture, _ = mixture_of(config)
    starts = [segment.start.sample for segment in mixture.segments]
    assert starts[:2] == [0, 101]
    schedule = LRSchedule(lr=1e-3, min_lr=1e-5)
    step = starts[2] // 8
    assert schedule.at(step, 50) < 2e-4 <= schedule.at(step - 1, 50)
    assert mixture.segments[2].counts[1] == 0


def test_a_phase_of_passes_waits_for_the_end_of_one(folder: Path) -> None:
    recipe = {"with": "medical", "replay": 0.1, "pass_tokens": 1600, "passes": 4}
    phases = [{"after_tokens": 2000, "replay": 0.4}, {"after_tokens": 9000, "replay": 0.5}]
    mixture, notes = mixture_of(config_of(folder, {"medical": None, "web": None}, mixture=recipe, phases=phases))
    assert [segment.counts for segment in mixture.segments] == [(180, 20), (120, 80)]
    assert notes == (
        "data.phases[0] waits for the end of a pass: sample 125 -> 200",
        "data.phases[1] waits for the end of a pass: sample 563 -> 600",
        "data.phases[1] begins at sample 600, after the end of the mixture: it never does",
    )


def test_a_phase_after_whole_passes_does_not_wait_for_another_one(folder: Path) -> None:
    # 1607 tokens are 100 samples of 16 and 7 tokens, which two passes do not make a sample of.
    recipe = {"with": "medical", "replay": 0.1, "pass_tokens": 1607, "passes": 4}
    phases = [{"after_tokens": 2 * 1607, "replay": 0.4}]
    mixture, notes = mixture_of(config_of(folder, {"medical": None, "web": None}, mixture=recipe, phases=phases))
    assert [segment.counts for segment in mixture.segments] == [(180, 20), (120, 80)]
    assert notes == ()


def test_phases_of_a_mixture_that_took_over_begin_with_its_passes(folder: Path) -> None:
    recipe = {"with": "medical", "replay": 0.1, "pass_tokens": 1600, "passes": 4}
    phases = [{"after_tokens": 2000, "replay": 0.4}]
    config = config_of(folder, {"medical": None, "web": None}, mixture=recipe, phases=phases)
    corpora = open_corpora(named_sources(config.data))
    mixture, _ = _solve(config, corpora, LRSchedule(lr=1e-3), Start(30, {"medical": 30}))
    assert [segment.start.sample for segment in mixture.segments] == [30, 130]
    assert [segment.counts for segment in mixture.segments] == [(90, 10), (180, 120)]


@pytest.mark.parametrize(
    ("sources", "data", "message"),
    [
        ({}, {}, r"data\.sources: declare at least one source"),
        ({"web": {"weight": 1.0}}, {"data_path": "x"}, r"data\.sources and data\.data_path are both set"),
        ({"web": {"weight": 1.0}}, {"mixture": {"passes": 2}}, r"passes and pass_tokens go together"),
        ({"web": {"weight": 1.0, "tokens": 5}}, {}, r"sources\.web\.tokens takes the best of a subset"),
        ({"web": {"epochs": 2}}, {"mixture": {"passes": 2, "pass_tokens": 1600}}, "do not go with passes of a mixture"),
        ({"web": {"weight": 1.0, "redraw": "once"}}, {}, r"sources\.web\.redraw is about passes"),
        ({"web": {"weight": 1.0, "repeat": True}}, {}, r"sources\.web\.repeat is about passes"),
        ({"web": {"weight": 1.0}}, {"phases": [{"weights": {"web": 1}}]}, r"phases\[0\]: set after_tokens or when_lr"),
        ({"web": {"weight": 1.0}}, {"phases": [{"after_tokens": 5}]}, r"phases\[0\]: set weights or replay"),
        ({"web": {"weight": 1.0}}, {"phases": [{"after_tokens": 5, "weights": {"wbe": 1}}]}, "no source 'wbe'"),
        ({"web": {"weight": 1.0}}, {"phases": [{"after_tokens": 5, "weights": {}}]},
         r"phases\[0\]\.weights: every weight is 0; give at least one source a positive weight"),
        ({"web": {"weight": 1.0}}, {"phases": [{"after_tokens": 5, "weights": {"web": 0}}]},
         r"phases\[0\]\.weights: every weight is 0"),
        ({"web": {"weight": 1.0}}, {"phases": [{"when_lr_below": 0.001, "weights": {"web": 1}}]},
         r"phases\[0\]: the learning rate does not fall below 0\.001"),
        ({"web": {"weight": 1.0}}, {"phases": [{"after_tokens": 500, "weights": {"web": 1}},
                                               {"after_tokens": 400, "weights": {"web": 1}}]},
         r"phases\[1\] begins at sample 25, not after"),
        ({"web": {"weight": 1.0}}, {"mixture": {"pass_tokens": 3, "passes": 1}}, "a pass is empty"),
        ({"small": {"weight": 1.0}}, {"mixture": {"pass_tokens": 1600, "passes": 1}},
         r"small: a pass of the mixture takes 1,600 tokens of it, but it has 288 in whole samples, 1,312 too few"),
        ({"web": {"weight": 0.3}, "medical": {"weight": 0.82}}, {"mixture": {"pass_tokens": 1600, "passes": 1}},
         r"sources: the shares of a pass sum to 1\.12 \(web 0\.3 \+ medical 0\.82\); make them sum to 1"),
        ({"web": None, "medical": None}, {"mixture": {"with": "medicine", "replay": 0.1}}, "no source 'medicine'"),
    ],
)  # fmt: skip
def test_contradictions_are_named(folder: Path, sources: dict[str, Any], data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mixture_of(config_of(folder, sources, {"train_iters": 20} if "mixture" not in data else None, **data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mixture": {"replay": "110%"}}, r"replay = '110%': .*between 0 and 1"),
        ({"mixture": {"pass_tokens": "5Q"}}, r"pass_tokens = '5Q': .*'5Q' is not a quantity"),
        ({"mixture": {"preset": "llama2"}}, r"preset = 'llama2'"),
        ({"mixture": {"wiht": "a"}}, r"unknown key 'data\.mixture\.wiht'; the nearest is 'data\.mixture\.with'"),
        ({"phases": [{"after": 3}]}, r"unknown key 'data\.phases\.0\.after'; the nearest is .*after_tokens"),
    ],
)
def test_values_are_checked_where_they_are_read(folder: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(folder, {"web": {"weight": 1.0}}, **data)
