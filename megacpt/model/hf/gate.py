"""The gate: imported weights have to compute what transformers computes from the same folder, or no run starts.

Two comparisons at the layout that will train. Each layer alone: it gets transformers' input and has to give
transformers' output, so that the first layer that departs has a name. Then the chain: logits, through the pipeline.
The reference is transformers in fp32 on weights rounded to the training dtype; it holds one layer at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megacpt.config.architecture import Architecture
from megacpt.errors import UserError
from megacpt.model.context import chunk_count, context_place, own_positions
from megacpt.model.gpt import LanguageModel
from megacpt.model.hf.config_json import architecture_from, config_for
from megacpt.model.hf.reference import Activations, reference_activations
from megacpt.model.hf.source import Source


@dataclass(frozen=True)
class Tolerance:
    """Largest error of a token, as a norm: `change` x that of what a layer adds + `state` x that of what it adds to.

    Logits: `alone` x their norm from transformers' last state, `chain` x their norm end to end.
    """

    change: float
    state: float
    alone: float
    chain: float


TOLERANCES = {
    torch.float32: Tolerance(change=1e-4, state=1e-6, alone=1e-4, chain=1e-3),
    torch.bfloat16: Tolerance(change=6e-2, state=1e-2, alone=5e-2, chain=2e-1),
}


@dataclass(frozen=True)
class Verdict:
    """Errors over tolerances (above 1: refused) of embedding, layers, output; the relative error of the logits."""

    ratios: list[float]
    logits: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"gate passed: on {self.tokens:,} tokens every layer agrees with transformers (worst at "
            f"{max(self.ratios):.2g} of its tolerance), logits end to end within {self.logits:.1e} of their norm"
        )


def check_import(
    chunks: Sequence[LanguageModel], source: Source, architecture: Architecture, tokens: torch.Tensor
) -> Verdict:
    """Compare the model in `chunks`, all ranks together, with transformers on `tokens` (int64 [n, s], the same on all).

    Raises:
        UserError: the two depart; names the first layer that does.
    """
    first = next(chunks[0].parameters())
    config, dtype = chunks[0].config, first.dtype
    # What sequence and context parallelism divide.
    unit = config.tensor_model_parallel_size * chunk_count(config.context_parallel_size)
    tokens = tokens[:, : tokens.shape[1] // unit * unit]
    reference = _shared_reference(source, architecture, tokens.to(first.device), dtype)
    tolerance = TOLERANCES[dtype]
    alone = _Comparison(reference, tolerance, len(chunks), replace_inputs=True)
    ratios = alone.run(chunks, tokens, tolerance.alone)
    names = ["the embedding", *(f"layer {i}" for i in range(architecture.num_layers)), "the final norm or output layer"]
    for name, ratio in zip(names, ratios, strict=True):
        if not ratio <= 1:
            raise UserError(
                f"{source.folder}: imported weights do not compute what transformers computes from it: {name} is the "
                f"first to depart ({ratio:.3g} times the tolerance); report this model, its conversion would be wrong"
            )
    chain = _Comparison(reference, tolerance, len(chunks), replace_inputs=False).run(chunks, tokens, tolerance.chain)[
        -1
    ]
    if not chain <= 1:
        raise UserError(
            f"{source.folder}: every imported layer agrees with transformers, but the logits end to end do not "
            f"({chain:.3g} times the tolerance); report this model and layout"
        )
    return Verdict(ratios, chain * tolerance.chain, tokens.numel())


def _shared_reference(
    source: Source, architecture: Architecture, tokens: torch.Tensor, dtype: torch.dtype
) -> Activations:
    """Computed by the first rank, sent to all."""
    shape = (*tokens.shape, architecture.hidden_size)
    if dist.get_rank() == 0:
        found = reference_activations(source, _reference_config(source, architecture), tokens, dtype)
    else:
        found = Activations(
            [torch.empty(shape, device=tokens.device) for _ in range(architecture.num_layers + 1)],
            torch.empty(*tokens.shape, architecture.vocab_size, device=tokens.device),
        )
    for tensor in (*found.states, found.logits):
        dist.broadcast(tensor, 0)
    return found


def _reference_config(source: Source, architecture: Architecture) -> Mapping[str, Any]:
    """The folder's own config.json, unless the run overrides what weights do not fix."""
    if architecture == architecture_from(source.config, str(source.folder)):
        return source.config
    return config_for(architecture, source.config, source.family)


class _Comparison:
    """One forward pass of all micro-batches (one sequence each), with hooks on the layers of this rank."""

    def __init__(self, reference: Activations, tolerance: Tolerance, chunks: int, *, replace_inputs: bool) -> None:
        self.reference, self.tolerance, self.replace_inputs = reference, tolerance, replace_inputs
        self.ratios = torch.zeros(len(reference.states) + 1, dtype=torch.float64)
        self.seen: dict[int, int] = {}

    def run(self, chunks: Sequence[LanguageModel], tokens: torch.Tensor, logits_tolerance: float) -> list[float]:
        """Errors over tolerances by place, the worst of all ranks."""
        device = next(chunks[0].parameters()).device
        # The interleaved schedule wants a multiple of the stages.
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        count = -(-len(tokens) // stages) * stages
        batches = [_own(tokens[number % len(tokens)])[None].to(device) for number in range(count)]
        handles = []
        for chunk in chunks:
            chunk.eval()
            for layer in chunk.decoder.layers if self.replace_inputs else ():
                number = layer.layer_number - 1
                handles.append(layer.register_forward_pre_hook(partial(self._before, number), with_kwargs=True))
                handles.append(layer.register_forward_hook(partial(self._after, number)))
            norm = chunk.decoder.final_layernorm if self.replace_inputs else None
            if norm is not None:
                handles.append(norm.register_forward_pre_hook(self._before_norm))
        with torch.no_grad():
            logits = get_forward_backward_func()(
                forward_step_func=_forward,
                data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
                model=list(chunks) if len(chunks) > 1 else chunks[0],
                num_microbatches=count,
                micro_batch_size=1,
                seq_length=tokens.shape[1],
                forward_only=True,
                collect_non_loss_data=True,
            )
        for handle in handles:
            handle.remove()
        for chunk in chunks:
            chunk.train()
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            for number, found in enumerate(logits):
                self._compare_logits(found[0], number % len(tokens), chunks[-1].real_rows, logits_tolerance)
        shared = self.ratios.float().to(device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()

    def _expected(self, place: int, micro_batch: int, like: torch.Tensor) -> torch.Tensor:
        """transformers' state [s, 1, h], this rank's part of the sequence under context and sequence parallelism."""
        whole = _own(self.reference.states[place][micro_batch % len(self.reference.logits)])[:, None]
        if like.shape[0] == whole.shape[0]:
            return whole
        return whole.chunk(whole.shape[0] // like.shape[0])[parallel_state.get_tensor_model_parallel_rank()]

    def _before(self, layer: int, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        micro_batch = self.seen.get(layer, 0)
        found = args[0] if args else kwargs["hidden_states"]
        expected = self._expected(layer, micro_batch, found)
        if layer == 0:
            self._record(0, (found - expected).norm(dim=-1), self.tolerance.state * expected.norm(dim=-1))
        replaced = expected.to(found.dtype)
        return ((replaced, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": replaced})

    def _before_norm(self, _: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        last = len(self.reference.states) - 1
        expected = self._expected(last, self.seen[last - 1] - 1, args[0])
        return (expected.to(args[0].dtype), *args[1:])

    def _after(self, layer: int, _: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        micro_batch = self.seen.get(layer, 0)
        self.seen[layer] = micro_batch + 1
        found = output[0] if isinstance(output, tuple) else output
        given, expected = (self._expected(layer + i, micro_batch, found) for i in (0, 1))
        limit = self.tolerance.change * (expected - given).norm(dim=-1) + self.tolerance.state * given.norm(dim=-1)
        self._record(layer + 1, (found - expected).norm(dim=-1), limit)

    def _compare_logits(self, found_SV: torch.Tensor, sequence: int, rows: int, tolerance: float) -> None:
        first = found_SV.shape[1] * parallel_state.get_tensor_model_parallel_rank()
        # A shard may be all padding; the norm is that of the whole vocabulary, scaled to this shard.
        whole = _own(self.reference.logits[sequence])
        expected = whole[:, first : first + rows]
        limit = tolerance * whole.norm(dim=-1) * (max(rows, 1) / whole.shape[1]) ** 0.5
        self._record(-1, (found_SV[:, :rows] - expected).norm(dim=-1), limit)

    def _record(self, place: int, error: torch.Tensor, limit: torch.Tensor) -> None:
        worst = float((error.double() / limit.double()).nan_to_num(nan=torch.inf).max())
        self.ratios[place] = max(float(self.ratios[place]), worst)


def _own(sequence: torch.Tensor) -> torch.Tensor:
    """Of [s, ...] the positions of this context-parallel rank."""
    return own_positions(sequence, *context_place())


def _forward(iterator: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[Any, Any]:
    tokens = next(iterator)
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return model(tokens, positions, None), lambda output, non_loss_data: output
