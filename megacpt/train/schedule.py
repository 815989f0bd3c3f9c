"""Learning rates as a pure function of the step: Megatron's styles and the infinite schedule.

Steps count finished iterations, as Megatron's scheduler does: iteration i (from 1) trains with the rate at step i - 1,
so with a warm-up from zero the first update changes nothing. Megatron's log line of iteration i shows the rate at step
i, which is the next iteration's.
"""

import math
from dataclasses import dataclass, fields

from megacpt.errors import UserError

DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD", "infinite")
ANNEAL_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")


@dataclass(frozen=True, kw_only=True)
class LRSchedule:
    """Warm-up from `lr_warmup_init` to `lr`, then a decay to `min_lr` that ends at iteration `lr_decay_iters`.

    Names and meanings are Megatron's. Warming up again at the start of continual pre-training ("re-warming") is a
    warm-up whose `lr_warmup_init` is the rate at which the base model stopped, or 0.

    `infinite` follows Ibrahim et al. 2024 (arXiv 2403.08763): warm-up, cosine cool-down to `lr_constant` over
    `lr_cooldown_iters`, constant, and a last anneal from there to `min_lr` over `lr_wsd_decay_iters` in the manner of
    `lr_wsd_decay_style`. A run saved before its anneal is continued without re-warming.

    `inverse-square-root` counts samples, as Megatron does: give it a warm-up, for without one the second iteration
    already falls by the square root of the global batch size.

    Raises:
        UserError: a value is out of range, or a style lacks what it needs. Lengths that depend on the run are checked
            by `check`.
    """

    lr: float  # the peak
    min_lr: float = 0.0
    lr_decay_style: str = "cosine"
    lr_decay_iters: int | None = None  # iterations, warm-up included; null: the whole run
    lr_warmup_init: float = 0.0
    lr_warmup_iters: int | None = None  # at most one of the three lr_warmup_* lengths; none: no warm-up
    lr_warmup_samples: int | None = None
    lr_warmup_fraction: float | None = None  # of lr_decay_iters
    lr_wsd_decay_style: str = "exponential"
    lr_wsd_decay_iters: int | None = None  # iterations of the last anneal of WSD (required) and infinite (null: none)
    lr_constant: float | None = None  # infinite: the rate of the long middle
    lr_cooldown_iters: int | None = None  # infinite: iterations from lr down to lr_constant

    def __post_init__(self) -> None:
        _check_values(self)

    def decay_iters(self, total_steps: int) -> int:
        """The iteration at which the decay ends."""
        return total_steps if self.lr_decay_iters is None else self.lr_decay_iters

    def warmup_steps(self, total_steps: int, global_batch_size: int) -> float:
        """Length of the warm-up in iterations; a fraction or a number of samples need not give a whole one."""
        if self.lr_warmup_fraction is not None:
            return self.lr_warmup_fraction * self.decay_iters(total_steps)
        if self.lr_warmup_samples is not None:
            return self.lr_warmup_samples / global_batch_size
        return self.lr_warmup_iters or 0

    def check(self, total_steps: int, global_batch_size: int) -> None:
        """Raise UserError if the phases do not fit into a run of `total_steps` iterations."""
        end, warmup = self.decay_iters(total_steps), self.warmup_steps(total_steps, global_batch_size)
        if self.lr_decay_style != "constant" and warmup >= end:
            raise UserError(
                f"schedule: the warm-up takes {warmup:g} iterations, but the decay ends at iteration {end}; "
                "shorten lr_warmup_* or raise lr_decay_iters"
            )
        phases = warmup + (self.lr_wsd_decay_iters or 0) + (self.lr_cooldown_iters or 0)
        if self.lr_decay_style in ("WSD", "infinite") and phases > end:
            raise UserError(
                f"schedule: the phases of {self.lr_decay_style} take {phases:g} iterations, but the decay ends at "
                f"iteration {end}; shorten lr_warmup_*, lr_cooldown_iters or lr_wsd_decay_iters"
            )

    def at(self, step: int, total_steps: int, global_batch_size: int = 1) -> float:
        """The learning rate of the iteration that follows `step` finished ones.

        Args:
            step: finished iterations, from 0.
            total_steps: iterations of the whole run; the end of the decay where `lr_decay_iters` is null.
            global_batch_size: samples per iteration; needed for a warm-up in samples and for inverse-square-root.
        """
        end, warmup = self.decay_iters(total_steps), self.warmup_steps(total_steps, global_batch_size)
        if warmup > 0 and step <= warmup:
            return self.lr_warmup_init + (self.lr - self.lr_warmup_init) * step / warmup
        if self.lr_decay_style == "constant":
            return self.lr
        if step > end:
            return self.min_lr
        if self.lr_decay_style == "inverse-square-root":
            peak, now = (max(count * global_batch_size, 1) for count in (warmup, step))
            return max(self.min_lr, self.lr * peak**0.5 / now**0.5)
        if self.lr_decay_style == "infinite":
            return self._infinite(step, warmup, end)
        if self.lr_decay_style == "WSD":
            share = _anneal(self.lr_wsd_decay_style, step, end, self.lr_wsd_decay_iters or 0)
        else:
            share = _remaining(self.lr_decay_style, (step - warmup) / (end - warmup))
        return self.min_lr + share * (self.lr - self.min_lr)

    def _infinite(self, step: int, warmup: float, end: int) -> float:
        assert self.lr_constant is not None
        assert self.lr_cooldown_iters is not None
        if step < warmup + self.lr_cooldown_iters:
            share = _remaining("cosine", (step - warmup) / self.lr_cooldown_iters)
            return self.lr_constant + share * (self.lr - self.lr_constant)
        share = _anneal(self.lr_wsd_decay_style, step, end, self.lr_wsd_decay_iters or 0)
        return self.min_lr + share * (self.lr_constant - self.min_lr)


def _anneal(style: str, step: int, end: int, length: int) -> float:
    """Share of the rate above `min_lr` that is left at `step`: 1 until `length` steps before `end`."""
    start = end - length
    return 1.0 if step <= start else _remaining(style, (step - start) / length)


def _remaining(style: str, done: float) -> float:
    """Share, from 1 down to 0, that is left when `done` (0 to 1) of a decay is over."""
    match style:
        case "linear":
            return 1.0 - done
        case "cosine":
            return 0.5 * (math.cos(math.pi * done) + 1.0)
        case "exponential":
            return 2.0 * math.pow(0.5, done) - 1.0
        case "minus_sqrt":
            return 1.0 - math.sqrt(done)
    raise AssertionError(style)


def _check_values(schedule: LRSchedule) -> None:
    if schedule.lr_decay_style not in DECAY_STYLES:
        raise UserError(
            f"schedule.lr_decay_style: {schedule.lr_decay_style!r} is unknown; choose one of {', '.join(DECAY_STYLES)}"
        )
    if schedule.lr_wsd_decay_style not in ANNEAL_STYLES:
        raise UserError(
            f"schedule.lr_wsd_decay_style: {schedule.lr_wsd_decay_style!r} is unknown; "
            f"choose one of {', '.join(ANNEAL_STYLES)}"
        )
    for field in fields(schedule):
        value = getattr(schedule, field.name)
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
            raise UserError(f"{field.name}: {value} must be a number of at least 0")
    if schedule.lr_decay_iters == 0:
        raise UserError(
            "schedule.lr_decay_iters: 0 iterations cannot hold a decay; give more, or null for the whole run"
        )
    for name in ("min_lr", "lr_warmup_init"):
        if getattr(schedule, name) > schedule.lr:
            raise UserError(f"{name}: {getattr(schedule, name)} exceeds lr {schedule.lr}; lower it or raise lr")
    lengths = ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction")
    given = [name for name in lengths if getattr(schedule, name)]
    if len(given) > 1:
        raise UserError(f"schedule: {' and '.join(given)} are both given; keep one of them")
    if (schedule.lr_warmup_fraction or 0) >= 1:
        raise UserError(f"schedule.lr_warmup_fraction: {schedule.lr_warmup_fraction} must be below 1")
    _check_style(schedule)


def _check_style(schedule: LRSchedule) -> None:
    """What only WSD and infinite need or allow."""
    style, infinite = schedule.lr_decay_style, schedule.lr_decay_style == "infinite"
    if style == "WSD" and schedule.lr_wsd_decay_iters is None:
        raise UserError("schedule.lr_wsd_decay_iters: WSD needs the length of its last phase in iterations; give one")
    for name in ("lr_constant", "lr_cooldown_iters"):
        if infinite and getattr(schedule, name) is None:
            raise UserError(f"schedule.{name}: the infinite schedule needs it; give a value")
        if not infinite and getattr(schedule, name) is not None:
            raise UserError(f"schedule.{name}: only the infinite schedule has it; remove it, or choose that style")
    if style not in ("WSD", "infinite") and schedule.lr_wsd_decay_iters is not None:
        raise UserError(f"schedule.lr_wsd_decay_iters: {style} has no last phase; remove it, or choose WSD or infinite")
    if schedule.lr_constant is not None and not schedule.min_lr <= schedule.lr_constant <= schedule.lr:
        raise UserError(
            f"schedule.lr_constant: {schedule.lr_constant} must lie between min_lr {schedule.min_lr} and "
            f"lr {schedule.lr}"
        )
