"""From every rank's statistics to the loss of each token, and to loss and tokens of each source.

The last stage of a cross-entropy over a vocabulary spread over ranks, where a token is three numbers a rank: mask and
sums by source cost one more read of each. A program writes its own row of sums, and one sum over those follows: no
atomics, so that the order of additions is the same in every run.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megacpt_kernels.dispatch import runs_triton
from megacpt_kernels.launch import launch_for
from megacpt_kernels.vocabulary import LOWEST


@dataclass(frozen=True)
class SourceSums:
    """Where a loss adds up what the tokens of each source lost, and how many they were; the numbers of a log line.

    Attributes:
        ids: [...] integers, the source of each token, 0 to S - 1; a token of another number belongs to none.
        sums: [2, S] float64, losses and tokens, added to. Not differentiable.
    """

    ids: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def zeros(cls, ids: torch.Tensor, sources: int) -> "SourceSums":
        """Of these tokens, nothing added up yet."""
        return cls(ids, torch.zeros((2, sources), dtype=torch.float64, device=ids.device))

    def rows(self, part: slice | None = None) -> "SourceSums":
        """The same sums for tokens [rows], or for a part of them."""
        ids = self.ids.flatten()
        return SourceSums(ids if part is None else ids[part], self.sums)

    def add(self, losses: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Add losses [...], in torch; a token does not count where `mask` [...] is 0, whatever it lost."""
        sources = self.sums.shape[1]
        counted = (self.ids >= 0) & (self.ids < sources)
        if mask is not None:
            counted &= mask != 0
        # Whoever does not count goes to a column that is dropped.
        column = self.ids.where(counted, sources).flatten().long()
        lost = losses.detach().double().where(counted, 0.0).flatten()
        both = torch.stack((lost, torch.ones_like(lost)))
        self.sums.add_(self.sums.new_zeros(2, sources + 1).index_add_(1, column, both)[:, :sources])


@triton.jit
def _losses_kernel(
    gathered_ptr: tl.tensor,  # [ranks, 3, rows] fp32, in
    mask_ptr: tl.tensor,  # [rows] uint8, in: 0 is no loss; or None
    ids_ptr: tl.tensor,  # [rows] integers, in: the source of a token; or None
    normaliser_ptr: tl.tensor,  # [rows] fp32, out: log of the sum of exp over the vocabulary
    losses_ptr: tl.tensor,  # [rows] fp32, out
    sums_ptr: tl.tensor,  # [programs, 2, sources] fp64, out: losses and tokens; or None
    rows: int,
    sources: int,
    RANKS: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    highest = tl.full((BLOCK,), LOWEST, tl.float32)
    wanted = tl.full((BLOCK,), float("-inf"), tl.float32)
    for rank in range(RANKS):
        highest = tl.maximum(highest, tl.load(gathered_ptr + rank * 3 * rows + row, mask=inside, other=0.0))
        wanted = tl.maximum(wanted, tl.load(gathered_ptr + (rank * 3 + 2) * rows + row, mask=inside, other=0.0))
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in range(RANKS):
        maximum = tl.load(gathered_ptr + rank * 3 * rows + row, mask=inside, other=0.0)
        part = tl.load(gathered_ptr + (rank * 3 + 1) * rows + row, mask=inside, other=1.0)
        total += part * tl.exp(maximum - highest)
    normaliser = highest + tl.log(total)
    losses = tl.log(total) + (highest - wanted)  # which cancels exactly where the target is the maximum
    counted = inside
    if mask_ptr is not None:
        counted = inside & (tl.load(mask_ptr + row, mask=inside, other=0) != 0)
        losses = tl.where(counted, losses, 0.0)
    tl.store(normaliser_ptr + row, normaliser, mask=inside)
    tl.store(losses_ptr + row, losses, mask=inside)
    if ids_ptr is not None:
        source = tl.load(ids_ptr + row, mask=inside, other=-1)
        sums_ptr += tl.program_id(0).to(tl.int64) * 2 * sources
        for number in range(sources):
            here = counted & (source == number)
            tl.store(sums_ptr + number, tl.sum(tl.where(here, losses, 0.0).to(tl.float64), 0))
            tl.store(sums_ptr + sources + number, tl.sum(here.to(tl.float64), 0))


def token_losses(
    gathered: torch.Tensor, mask: torch.Tensor | None, sources: SourceSums | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[ranks, 3, rows] to the log-sum-exp and the loss of each row, fp32; a loss is 0 where `mask` [rows] uint8 is.

    A target that no rank holds, padding for instance, has the loss +inf. Losses are added to `sources`, of [rows] ids.
    """
    if not runs_triton(gathered):
        return token_losses_reference(gathered, mask, sources)
    ranks, _, rows = gathered.shape
    normaliser = torch.empty(rows, dtype=torch.float32, device=gathered.device)
    losses = torch.empty_like(normaliser)
    launch = launch_for("token_losses", rows, 4, gathered.device)
    programs, sums = triton.cdiv(rows, launch.block), None
    if sources is not None:
        sums = torch.empty((programs, *sources.sums.shape), dtype=torch.float64, device=gathered.device)
    if rows:
        _losses_kernel[(programs,)](
            gathered.contiguous(),
            mask,
            None if sources is None else sources.ids.contiguous(),
            normaliser,
            losses,
            sums,
            rows,
            0 if sources is None else sources.sums.shape[1],
            RANKS=ranks,
            LOWEST=LOWEST,
            BLOCK=launch.block,
            num_warps=launch.warps,
        )
    if sources is not None and sums is not None:
        sources.sums.add_(sums.sum(0))
    return normaliser, losses


def token_losses_reference(
    gathered: torch.Tensor, mask: torch.Tensor | None, sources: SourceSums | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_losses` in torch."""
    maximum, part, wanted = gathered.unbind(1)
    highest = maximum.amax(0)
    logarithm = ((maximum - highest).exp() * part).sum(0).log()
    losses = logarithm + (highest - wanted.amax(0))
    if mask is not None:
        losses = losses.where(mask != 0, 0.0)
    if sources is not None:
        sources.add(losses, mask)
    return highest + logarithm, losses
