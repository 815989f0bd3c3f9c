"""One rank asks, all ranks compute: rank 0 runs whatever drives an evaluation, the others serve its forward passes.

So task files, prompts and metrics exist once, and a mistake in them happens on one rank, which tells the others to go
on instead of leaving them waiting.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megacpt.eval.packing import Row, pack
from megacpt.eval.scoring import Queries, Scores, ScoringFailed, score
from megacpt.model.gpt import unwrap
from megacpt.runtime.setup import RankLost

ROW_TOKENS = 1024
"""How far a row grows by taking in sequences that begin alike."""


@dataclass(frozen=True)
class LiveModel:
    """The model as it lies on the ranks.

    Attributes:
        chunks: this rank's part, bare or wrapped by DistributedDataParallel.
        max_length: longest input in tokens.
        batch_tokens: padded tokens of a micro-batch.
    """

    chunks: Sequence[torch.nn.Module]
    max_length: int
    batch_tokens: int

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return next(unwrap(self.chunks[0]).parameters()).device

    def lead[T](self, work: Callable[[], T]) -> T | None:
        """Run `work` on rank 0, which may call `ask`; on the other ranks serve it and return None.

        An exception of `work` is raised on rank 0 alone, once the others have been let go; of RankLost nobody is told,
        for nobody listens.
        """
        if dist.get_rank() == 0:
            try:
                found = work()
            except RankLost:
                raise
            except BaseException:
                self._tell(None)
                raise
            self._tell(None)
            return found
        while (request := self._tell(None)) is not None:
            try:
                rows, queries = request
                score(self.chunks, rows, queries, self.batch_tokens)
            except ScoringFailed:
                continue  # rank 0 raises it too, and decides what becomes of it
        return None

    def ask(self, inputs: Sequence[Sequence[int]], conts: Sequence[Sequence[int]]) -> list[Scores]:
        """What the model says of the last len(cont) positions of each input; on rank 0, inside `lead`.

        Args:
            inputs: token ids, at most max_length; equal ones, and equal beginnings, are computed once.
            conts: the tokens that follow those positions, the last of which is in no input.

        Raises:
            ScoringFailed: on every rank where a forward pass raised, on rank 0 where the model gives no numbers: the
                likeliest of several NaN is the first, so that a metric would look like one.
            RankLost: as `scoring.score`.
        """
        # Transformer Engine's attention is causal, and rows that are trees need a mask.
        row_tokens = 0 if unwrap(self.chunks[0]).engine else min(ROW_TOKENS, self.max_length)
        packed = pack(inputs, row_tokens)
        lengths = [len(cont) for cont in conts]
        queries = Queries(
            rows=np.repeat(packed.row_of, lengths),
            places=np.concatenate([path[-length:] for path, length in zip(packed.places, lengths, strict=True)]),
            targets=np.concatenate([np.asarray(cont, dtype=np.int64) for cont in conts]),
        )
        self._tell((packed.rows, queries))
        scores = score(self.chunks, packed.rows, queries, self.batch_tokens)
        if lost := int(np.isnan(scores.logprobs).sum()):
            raise ScoringFailed(f"{lost:,} of {len(scores.logprobs):,} log-probabilities are NaN")
        ends = np.cumsum(lengths)[:-1]
        parts = zip(np.split(scores.logprobs, ends), np.split(scores.likeliest, ends), strict=True)
        return [Scores(logprobs, likeliest) for logprobs, likeliest in parts]

    def _tell(self, request: tuple[list[Row], Queries] | None) -> tuple[list[Row], Queries] | None:
        """Rank 0's request, on every rank; None: it has no more."""
        box = [request]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]
