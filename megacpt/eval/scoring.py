"""Log-probabilities of given tokens under the live model, at any TP/PP/CP/DP: the one thing that task evaluation asks.

All ranks call `score` with the same rows and queries. Rows are cut into micro-batches, longest first, dealt to the
data-parallel replicas and sent through megatron-core's pipeline schedule; of each row a context-parallel rank has its
chunks, and the queries that lie there. The output layer runs at the queried positions only, and its logits stay split
over the vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megacpt.eval.agreement import first_failure
from megacpt.eval.packing import Row
from megacpt.model.context import chunk_count, context_place, own_positions
from megacpt.model.gpt import LanguageModel, unwrap

POSITIONS_AT_ONCE = 512
"""Positions whose logits are in memory together."""
MIN_FILL = 0.7
"""A row shorter than this part of a micro-batch's longest begins another one: padding is computed, too."""
FP8_ROWS = 32
"""Positions of a rank are a multiple of this under FP8; every recipe can do with it."""
IN_FLIGHT = 4
"""Micro-batches of one pipeline call, in multiples of the stages: the more, the smaller the idle share."""


class ScoringFailed(Exception):
    """A forward pass raised on some rank; every rank raises this together."""


@dataclass(frozen=True)
class Queries:
    """Which tokens are asked for: int64 [n] each. `places` index a row's tokens; `targets` follow those tokens."""

    rows: np.ndarray
    places: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Scores:
    """By query: natural log-probability of the target (float64 [n]) and the likeliest token (int64 [n])."""

    logprobs: np.ndarray
    likeliest: np.ndarray


Call = list[list[list[int]]]
"""Row numbers by data-parallel replica and micro-batch; an empty micro-batch is a filler."""


def plan_calls(lengths: Sequence[int], batch_tokens: int, stages: int, replicas: int) -> list[Call]:
    """Cut rows (lengths falling) into pipeline calls of equally many micro-batches on each replica.

    Args:
        batch_tokens: padded tokens of a micro-batch; a longer row is alone in its own.
        stages: of the pipeline; a call has one micro-batch if there is one stage, else a multiple of the stages.
    """
    batches: list[list[int]] = []
    for number in range(len(lengths)):
        batch = batches[-1] if batches else []
        longest = lengths[batch[0]] if batch else 0
        if batch and (len(batch) + 1) * longest <= batch_tokens and lengths[number] >= MIN_FILL * longest:
            batch.append(number)
        else:
            batches.append([number])
    calls: list[Call] = []
    while batches:
        wanted = -(-len(batches) // (replicas * stages))
        count = stages * min(wanted, IN_FLIGHT if stages > 1 else 1)
        taken, batches = batches[: count * replicas], batches[count * replicas :]
        taken += [[] for _ in range(count * replicas - len(taken))]
        calls.append([taken[replica::replicas] for replica in range(replicas)])
    return calls


@torch.no_grad()
def score(chunks: Sequence[torch.nn.Module], rows: Sequence[Row], queries: Queries, batch_tokens: int) -> Scores:
    """Score all queries, on all ranks together; every rank returns the same.

    Args:
        chunks: this rank's model, bare or wrapped by DistributedDataParallel.
        rows: longest first.

    Raises:
        ScoringFailed: a forward pass raised, on whichever rank.
        RankLost: it raised on this rank alone, and others wait for it there.
    """
    device = next(chunks[0].parameters()).device
    found = torch.zeros(2, len(queries.rows), dtype=torch.float64, device=device)
    failure: Exception | None = None
    try:
        _forward_all(chunks, rows, queries, batch_tokens, found)
    except Exception as error:
        failure = error
    reason = first_failure(failure)
    if reason is not None:
        raise ScoringFailed(f"the forward pass failed ({reason})") from failure
    dist.all_reduce(found)
    logprobs, likeliest = found.cpu().numpy()
    return Scores(logprobs, likeliest.astype(np.int64))


def _forward_all(
    chunks: Sequence[torch.nn.Module], rows: Sequence[Row], queries: Queries, batch_tokens: int, found: torch.Tensor
) -> None:
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    replicas = parallel_state.get_data_parallel_world_size()
    asked = _queries_by_row(len(rows), queries.rows)
    answers = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    with _evaluating(chunks):
        for call in plan_calls([len(row) for row in rows], batch_tokens, stages, replicas):
            longest = max(len(rows[number]) for replica in call for batch in replica for number in batch)
            unit = parallel_state.get_tensor_model_parallel_world_size() * chunk_count(context_place()[0])
            unit *= FP8_ROWS if unwrap(chunks[0]).config.fp8 else 1
            shape = (max(len(batch) for replica in call for batch in replica), -(-longest // unit) * unit)
            mine = call[parallel_state.get_data_parallel_rank()]
            batches = [_context_part(_batch(batch, rows, asked, queries, shape)) for batch in mine]
            outputs = _run(chunks, batches, shape)
            if answers and parallel_state.get_tensor_model_parallel_rank() == 0:
                for batch, (logprobs, likeliest) in zip(batches, outputs, strict=True):
                    where = batch.numbers.to(found.device)
                    found[0, where], found[1, where] = logprobs.double(), likeliest.double()


@dataclass(frozen=True)
class _Batch:
    """tokens, positions int64 [b, s]; hidden bool [b, 1, s, t] or None; of the queries: number, place, target [n].

    t is s, or the whole length where context-parallel ranks have s positions of it each, and the queries there.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor | None
    numbers: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor


def _queries_by_row(rows: int, row_of: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(row_of, kind="stable")
    return np.split(order, np.searchsorted(row_of[order], np.arange(1, rows)))


def _batch(
    batch: Sequence[int], rows: Sequence[Row], asked: Sequence[np.ndarray], queries: Queries, shape: tuple[int, int]
) -> _Batch:
    tokens, positions = np.zeros(shape, np.int64), np.tile(np.arange(shape[1]), (shape[0], 1))
    plain = all(rows[number].is_plain for number in batch)
    hidden = None if plain else np.broadcast_to(~np.eye(shape[1], dtype=bool), (shape[0], 1, *shape[1:] * 2)).copy()
    numbers, places = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for line, number in enumerate(batch):
        row = rows[number]
        tokens[line, : len(row)], positions[line, : len(row)] = row.tokens, row.depths
        if hidden is not None:
            hidden[line, 0] = row.hidden(shape[1])
        numbers.append(asked[number])
        places.append(line * shape[1] + queries.places[asked[number]])
    chosen = np.concatenate(numbers)
    arrays = (tokens, positions, chosen, np.concatenate(places), queries.targets[chosen])
    token_BS, position_BS, number_N, place_N, target_N = (torch.from_numpy(array) for array in arrays)
    mask = None if hidden is None else torch.from_numpy(hidden)
    return _Batch(token_BS, position_BS, mask, number_N, place_N, target_N)


def _context_part(batch: _Batch) -> _Batch:
    """What this context-parallel rank has of a micro-batch: its chunks of every row, and the queries that lie there."""
    size, rank = context_place()
    if size == 1:
        return batch
    lines, length = batch.tokens.shape
    everywhere = torch.arange(lines * length).view(lines, length)
    own = own_positions(everywhere, size, rank, dim=1).flatten()
    local = torch.full((lines * length,), -1).index_copy(0, own, torch.arange(len(own)))[batch.places]
    here = local >= 0
    return _Batch(
        tokens=own_positions(batch.tokens, size, rank, dim=1),
        positions=own_positions(batch.positions, size, rank, dim=1),
        hidden=None if batch.hidden is None else own_positions(batch.hidden, size, rank, dim=2),
        numbers=batch.numbers[here],
        places=local[here],
        targets=batch.targets[here],
    )


@contextmanager
def _evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Evaluation mode, with rotary phases that follow the positions given."""
    models = [unwrap(chunk) for chunk in chunks]
    before = [(model.training, model.restart_positions) for model in models]
    for chunk, model in zip(chunks, models, strict=True):
        chunk.eval()
        model.restart_positions = not model.engine
    try:
        yield
    finally:
        for chunk, model, (training, restart) in zip(chunks, models, before, strict=True):
            chunk.train(training)
            model.restart_positions = restart


def _run(chunks: Sequence[torch.nn.Module], batches: Sequence[_Batch], shape: tuple[int, int]) -> list[Any]:
    device = next(chunks[0].parameters()).device
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, device),
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        micro_batch_size=shape[0],
        seq_length=shape[1],
        forward_only=True,
        collect_non_loss_data=True,
    )


def _forward_step(device: torch.device, iterator: Iterator[_Batch], model: torch.nn.Module) -> tuple[Any, Any]:
    batch = next(iterator)
    output = model(
        batch.tokens.to(device),
        batch.positions.to(device),
        None if batch.hidden is None else batch.hidden.to(device),
        output_processor=partial(_score_positions, unwrap(model), batch.places.to(device), batch.targets.to(device)),
    )
    return output, lambda output, non_loss_data: output


def _score_positions(
    model: LanguageModel, places_N: torch.Tensor, targets_N: torch.Tensor, /, hidden_states: torch.Tensor, **others: Any
) -> torch.Tensor:
    """The head of the last stage, at some positions: float64 [2, n], log-probabilities and likeliest tokens."""
    layer, group = others["output_layer"], model.pg_collection.tp
    sequence_parallel = layer.sequence_parallel
    if sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
    states_NH = hidden_states.transpose(0, 1).flatten(0, 1)[places_N]
    parts = [torch.zeros(2, 0, dtype=torch.float64, device=places_N.device)]
    try:
        layer.sequence_parallel = False
        for start in range(0, len(places_N), POSITIONS_AT_ONCE):
            part = slice(start, start + POSITIONS_AT_ONCE)
            logits, _ = layer(states_NH[part, None], weight=others["output_weight"])
            parts.append(vocabulary_parallel_scores(model.mask_padding(logits)[:, 0], targets_N[part], group))
    finally:
        layer.sequence_parallel = sequence_parallel
    return torch.cat(parts, 1)


def vocabulary_parallel_scores(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """Log-probability of each target and the likeliest token, float64 [2, n], from this rank's part of the logits.

    Of equal logits the lowest token is the likeliest. Sums are in fp32.
    """
    logits = logits_NV.float()
    rows, rank = logits.shape[1], dist.get_rank(group)
    top_N, index_N = logits.max(1)
    tops = [torch.empty_like(top_N) for _ in range(dist.get_world_size(group))]
    indices = [torch.empty_like(index_N) for _ in tops]
    dist.all_gather(tops, top_N, group)
    dist.all_gather(indices, index_N + rank * rows, group)
    highest_N, shard_N = torch.stack(tops).max(0)
    likeliest_N = torch.stack(indices).gather(0, shard_N[None])[0]
    local_N = targets_N - rank * rows
    here_N = (local_N >= 0) & (local_N < rows)
    target_N = logits.gather(1, local_N.clamp(0, rows - 1)[:, None])[:, 0]
    sums = torch.stack([(logits - highest_N[:, None]).exp().sum(1), target_N.where(here_N, torch.zeros_like(target_N))])
    dist.all_reduce(sums, group=group)
    return torch.stack([(sums[1] - highest_N).double() - sums[0].double().log(), likeliest_N.double()])
