"""The learning-rate schedules as tables, and step by step against Megatron's own scheduler."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megacpt.errors import UserError
from megacpt.train.schedule import ANNEAL_STYLES, DECAY_STYLES, LRSchedule

PEAK = {"lr": 1.0, "min_lr": 0.1}
INFINITE = PEAK | {"lr_decay_style": "infinite", "lr_constant": 0.5, "lr_cooldown_iters": 4, "lr_wsd_decay_iters": 4}

TABLES = [
    ({"lr_decay_style": "constant"}, {0: 1, 5: 1, 50: 1}),
    ({"lr_decay_style": "constant", "lr_warmup_iters": 4}, {0: 0, 1: 0.25, 4: 1, 50: 1}),
    ({"lr_decay_style": "linear"}, {0: 1, 5: 0.55, 10: 0.1, 11: 0.1}),
    ({"lr_decay_style": "linear", "lr_decay_iters": 5}, {0: 1, 1: 0.82, 5: 0.1, 9: 0.1}),
    ({"lr_decay_style": "cosine", "lr_warmup_iters": 2}, {0: 0, 1: 0.5, 2: 1, 4: 0.868198, 6: 0.55, 10: 0.1, 99: 0.1}),
    ({"lr_decay_style": "cosine", "lr_warmup_iters": 2, "lr_warmup_init": 0.2}, {0: 0.2, 1: 0.6, 2: 1}),
    ({"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 1}, {0: 0, 1: 1, 4: 0.5, 9: 1 / 3}),
    ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4}, {0: 1, 6: 1, 8: 0.1 + 0.9 * (2**0.5 - 1), 10: 0.1}),
    ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4, "lr_wsd_decay_style": "minus_sqrt"}, {6: 1, 7: 0.55, 10: 0.1}),
    (INFINITE | {"lr_warmup_iters": 2}, {0: 0, 1: 0.5, 2: 1, 4: 0.75, 6: 0.5, 10: 0.1}),
    (INFINITE | {"lr_wsd_decay_iters": 2, "lr_wsd_decay_style": "linear"}, {0: 1, 4: 0.5, 8: 0.5, 9: 0.3, 10: 0.1}),
    (INFINITE | {"lr_wsd_decay_iters": None}, {4: 0.5, 7: 0.5, 10: 0.5, 11: 0.1}),
    (INFINITE | {"lr_cooldown_iters": 0}, {0: 0.5, 6: 0.5, 10: 0.1}),
]


@pytest.mark.parametrize(("settings", "table"), TABLES)
def test_table(settings: dict[str, Any], table: dict[int, float]) -> None:
    schedule = LRSchedule(**(PEAK | settings))
    schedule.check(10, 8)
    assert {step: schedule.at(step, 10) for step in table} == pytest.approx(table, rel=1e-6)


@pytest.mark.parametrize("length", [{"lr_warmup_iters": 4}, {"lr_warmup_samples": 32}, {"lr_warmup_fraction": 0.4}])
def test_a_warm_up_can_be_given_in_iterations_samples_or_as_a_fraction(length: dict[str, Any]) -> None:
    schedule = LRSchedule(**PEAK, **length)
    assert [schedule.at(step, 10, 8) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("style", [s for s in DECAY_STYLES if s != "infinite"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_step_equals_megatrons_scheduler(style: str, data: st.DataObject) -> None:
    total = data.draw(st.integers(2, 60))
    decay = data.draw(st.none() | st.integers(2, 80))
    end = total if decay is None else decay
    warmup = data.draw(st.integers(0, end - 1))
    batch = data.draw(st.integers(1, 512))
    fraction = data.draw(st.none() | st.floats(0.0, 0.99))
    anneal = data.draw(st.integers(0, end - (warmup if fraction is None else 0))) if style == "WSD" else None
    lr = data.draw(st.floats(1e-6, 1.0))
    schedule = LRSchedule(
        lr=lr,
        min_lr=data.draw(st.floats(0, lr)),
        lr_decay_style=style,
        lr_decay_iters=decay,
        lr_warmup_init=data.draw(st.floats(0, lr)),
        lr_warmup_iters=warmup if fraction is None else None,
        lr_warmup_fraction=fraction,
        lr_wsd_decay_style=data.draw(st.sampled_from(ANNEAL_STYLES)),
        lr_wsd_decay_iters=anneal,
    )
    group: dict[str, Any] = {"params": [], "default_config": True}
    theirs = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=schedule.lr_warmup_init,
        max_lr=schedule.lr,
        min_lr=schedule.min_lr,
        lr_warmup_steps=warmup * batch if fraction is None else fraction * (end * batch),
        lr_decay_steps=end * batch,
        lr_decay_style=style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=total * batch,
        wd_incr_style="constant",
        wsd_decay_steps=None if anneal is None else anneal * batch,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
    )
    for step in range(total + 3):
        assert schedule.at(step, total, batch) == pytest.approx(group["lr"], rel=1e-9, abs=1e-18), step
        theirs.step(batch)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_infinite_has_no_jumps_but_the_phases_it_names(data: st.DataObject) -> None:
    warmup, cooldown, flat, anneal = (data.draw(st.integers(1, 40)) for _ in range(4))
    total = warmup + cooldown + flat + anneal
    style = data.draw(st.sampled_from(ANNEAL_STYLES))
    schedule = LRSchedule(
        **(INFINITE | {"lr_cooldown_iters": cooldown, "lr_wsd_decay_iters": anneal, "lr_wsd_decay_style": style}),
        lr_warmup_iters=warmup,
    )
    schedule.check(total, 1)
    rates = [schedule.at(step, total) for step in range(total + 1)]
    assert rates[0] == 0
    assert rates[warmup] == 1
    assert all(rate == 0.5 for rate in rates[warmup + cooldown : total - anneal + 1])
    assert rates[total] == pytest.approx(0.1)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_the_start_of_an_infinite_schedule_does_not_depend_on_the_length_of_the_run() -> None:
    schedule = LRSchedule(**INFINITE, lr_warmup_iters=2)
    assert [schedule.at(step, 50) for step in range(40)] == [schedule.at(step, 5000) for step in range(40)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr_decay_style": "cosin"}, ["lr_decay_style", "cosin", "inverse-square-root"]),
        ({"lr_wsd_decay_style": "1-sqrt"}, ["lr_wsd_decay_style", "minus_sqrt"]),
        ({"lr": -1.0}, ["lr: -1.0"]),
        ({"lr": float("nan")}, ["lr: nan"]),
        ({"min_lr": 2.0}, ["min_lr: 2.0", "lr 1.0"]),
        ({"lr_warmup_init": 2.0}, ["lr_warmup_init"]),
        ({"lr_warmup_iters": 3, "lr_warmup_fraction": 0.1}, ["lr_warmup_iters and lr_warmup_fraction"]),
        ({"lr_warmup_fraction": 1.0}, ["lr_warmup_fraction: 1.0"]),
        ({"lr_decay_iters": 0}, ["lr_decay_iters"]),
        ({"lr_decay_style": "WSD"}, ["lr_wsd_decay_iters"]),
        ({"lr_decay_style": "linear", "lr_wsd_decay_iters": 5}, ["lr_wsd_decay_iters", "linear"]),
        ({"lr_decay_style": "infinite", "lr_constant": 0.5}, ["lr_cooldown_iters"]),
        ({"lr_decay_style": "infinite", "lr_cooldown_iters": 5}, ["lr_constant"]),
        ({"lr_constant": 0.5}, ["lr_constant", "only the infinite"]),
        (INFINITE | {"lr_constant": 0.05}, ["lr_constant: 0.05", "min_lr 0.1"]),
    ],
)
def test_a_mistake_is_one_sentence(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        LRSchedule(**(PEAK | settings))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr_warmup_iters": 10}, ["10 iterations", "iteration 10"]),
        ({"lr_warmup_samples": 80}, ["10 iterations"]),
        (INFINITE | {"lr_warmup_iters": 3}, ["phases of infinite take 11 iterations"]),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 11}, ["phases of WSD take 11 iterations"]),
    ],
)
def test_phases_that_do_not_fit_into_the_run_are_refused(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        LRSchedule(**(PEAK | settings)).check(10, 8)
    assert all(word in str(caught.value) for word in words), caught.value
