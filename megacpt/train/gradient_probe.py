"""Plasticity against stability: the gradient of a step's domain samples beside that of its other samples, by layer.

Both are taken at the weights with which the step begins, of the very batch that it trains on, each as the mean over its
own unmasked targets: two forward and backward passes, with the other samples' targets masked out. Nothing of it is left
when the step begins: gradient buffers are zeroed, the optimizer has not been called, no other data has been read.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megacpt.model.forward import Batch, run_batches
from megacpt.model.gpt import LanguageModel
from megacpt.train.rows import Row
from megacpt.train.shares import BLOCK, gradient_shares, sum_over_ranks


@dataclass(frozen=True)
class Probe:
    """What a probe works on.

    Attributes:
        sources: how many there are.
        domain: numbers of those that are the domain.
        sample_shape: (micro-batch size, seq_length).
    """

    chunks: Sequence[LanguageModel]
    wrapped: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    sources: int
    domain: frozenset[int]
    sample_shape: tuple[int, int]

    def measure(self, batches: Sequence[Batch]) -> Row | str:
        """The row of a step's batch, without the common fields, or why there is none; the same on every rank."""
        shares = gradient_shares(self.chunks, self.optimizer)
        general = frozenset(range(self.sources)) - self.domain
        tokens = self._backward(batches, self.domain)
        kept = [share.of(share.gradient).clone() for share in shares]
        others = self._backward(batches, general)
        sums = torch.zeros(self.chunks[0].config.num_layers, 3, dtype=torch.float64)
        for share, domain in zip(shares, kept, strict=True):
            now = share.of(share.gradient)
            sums[share.layer] += sum(map(_products, domain.split(BLOCK), now.split(BLOCK)), start=sums.new_zeros(3))
        self._forget()
        sums = sum_over_ranks(sums)
        if not tokens or not others:
            return f"the batch has no sample of {'the domain' if not tokens else 'other sources'}"
        return {"gradient_probe": [{"layer": layer} | _compare(sums[layer]) for layer in range(len(sums))]}

    def _backward(self, batches: Sequence[Batch], sources: Collection[int]) -> int:
        """Leave the mean gradient over the targets of some sources in the buffers; returns how many targets."""
        self._forget()
        sums = run_batches(
            self.wrapped, [_masked(batch, sources) for batch in batches], self.sources, self.sample_shape, train=True
        )
        return int(sums[1].sum())

    def _forget(self) -> None:
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()


def _masked(batch: Batch, sources: Collection[int]) -> Batch:
    """The micro-batch with only the targets of some sources; an empty one stays empty."""
    if not batch:
        return batch
    chosen = torch.isin(batch["source"], torch.tensor(sorted(sources), dtype=batch["source"].dtype))
    return batch | {"loss_mask": batch["loss_mask"] * chosen[:, None]}


def _products(domain: torch.Tensor, general: torch.Tensor) -> torch.Tensor:
    """float64 [3]: dot product and the two squared norms."""
    a, b = domain.double(), general.double()
    return torch.stack([a @ b, a @ a, b @ b]).cpu()


def _compare(sums: torch.Tensor) -> Row:
    """Cosine (None where a gradient is zero, as in frozen layers) and norms."""
    dot, domain, general = sums.tolist()
    both = math.sqrt(domain) * math.sqrt(general)
    return {
        "cosine": dot / both if both else None,
        "domain_norm": math.sqrt(domain),
        "general_norm": math.sqrt(general),
    }
