"""What changes while a run trains, and nothing else; all of it goes into a checkpoint."""

import time
from dataclasses import dataclass, field

import torch

from megacpt.train.plan import Plan


@dataclass
class Progress:
    """What changes while training; everything here goes into a checkpoint.

    Attributes:
        tokens: target tokens seen by source, int64 [sources].
        former_tokens: those seen of sources that the mixture no longer has, by name.
        interval: float64 [2, sources], summed loss and tokens since the last log line.
        interval_steps: steps in that interval.
    """

    iteration: int
    tokens: torch.Tensor
    former_tokens: dict[str, int]
    interval: torch.Tensor
    interval_steps: int = 0
    interval_began: float = field(default_factory=time.perf_counter)

    @property
    def consumed_tokens(self) -> int:
        """Target tokens seen by the whole run."""
        return int(self.tokens.sum()) + sum(self.former_tokens.values())


def progress_at_start(plan: Plan) -> Progress:
    """Nothing yet, or what the checkpoint to go on from says."""
    names = [source.name for source in plan.mixture.sources]
    if plan.resume is None:
        tokens = torch.zeros(len(names), dtype=torch.long)
        return Progress(0, tokens, {}, torch.zeros(2, len(names), dtype=torch.float64))
    state = plan.resume.state
    same_sources = list(state.mixture["sources"]) == names
    sums = state.interval["sums"] if same_sources else [[0.0] * len(names)] * 2
    return Progress(
        iteration=state.iteration,
        tokens=torch.tensor([state.tokens_by_source.get(name, 0) for name in names]),
        former_tokens={name: count for name, count in state.tokens_by_source.items() if name not in names},
        interval=torch.tensor(sums, dtype=torch.float64),
        interval_steps=state.interval["steps"] if same_sources else 0,
    )
