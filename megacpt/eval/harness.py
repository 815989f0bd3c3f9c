"""lm_eval's view of the live model. Imported only where lm_eval is needed; without it, the import is a UserError."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megacpt.errors import UserError
from megacpt.eval.codec import Codec
from megacpt.eval.live import LiveModel

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as lm_eval_is_absent:
    raise UserError(
        "tasks are run by lm_eval (lm-evaluation-harness), which is not installed; pip install 'megacpt[eval]'"
    ) from lm_eval_is_absent

MAX_GEN_TOKS = 256
"""Tokens generated where a task does not say how many, as in lm_eval's `hf` model."""

Encoded = tuple[Any, list[int], list[int]]
"""A request and the ids of its context and continuation."""


class MegacptLM(TemplateLM):
    """Answers lm_eval's requests as its `hf` model answers them for the exported folder; on rank 0, inside `lead`.

    Splitting context from continuation is TemplateLM's own code; framing, truncation from the left and the windows of
    a rolling log-likelihood follow `hf` (lm_eval 0.4.13). Generation is greedy and keeps no key-value cache: our
    attention takes whole sequences, so each new token costs a forward pass over its sequence.
    """

    def __init__(self, model: LiveModel, codec: Codec) -> None:
        super().__init__()
        self._model, self._codec = model, codec

    @property
    def eot_token_id(self) -> int:
        eos = self._codec.eos_id
        if eos is None:
            raise UserError("the tokenizer names no end-of-text token, which tasks need; name one in its config")
        return eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the beginning-of-text token, else the end-of-text token."""
        return self.eot_token_id if self._codec.bos_id is None else self._codec.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; a text that spells the prefix token itself is not given another one."""
        if add_special_tokens is None and has_bos_prefix(string, self._codec.decode([self.prefix_token_id], False)):
            add_special_tokens = False
        return self._codec.encode(string, add_special_tokens)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding would give it."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_: Any) -> list[tuple[float, bool]]:
        return [
            (float(scores.logprobs.sum()), bool((scores.likeliest == np.asarray(continuation)).all()))
            for scores, (_, _, continuation) in zip(self._ask(requests), requests, strict=True)
        ]

    def _ask(self, requests: Sequence[Encoded]) -> list[Any]:
        longest = self._model.max_length
        for _, context, continuation in requests:
            if not context or not 0 < len(continuation) <= longest:
                raise UserError(
                    f"a task's continuation has {len(continuation)} tokens after {len(context)} of context; the model "
                    f"takes 1 to {longest} after at least one"
                )
        inputs = [(context + continuation)[-(longest + 1) :][:-1] for _, context, continuation in requests]
        return self._model.ask(inputs, [continuation for _, _, continuation in requests]) if requests else []

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Log-probability of whole texts, each token predicted once, in windows of the model's full length."""
        encoded: list[Encoded] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._model.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                encoded.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, scores in zip(owners, self._ask(encoded), strict=True):
            totals[owner] += float(scores.logprobs.sum())
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations up to a stop sequence, the end-of-text token or the task's number of tokens.

        Raises:
            UserError: a task wants to sample, or to generate more than the model takes.
        """
        stop_text = self._codec.decode([self.eot_token_id], False)
        jobs = [_Generation(request.args[1], stop_text) for request in requests]
        texts: list[list[int]] = []
        for request, job in zip(requests, jobs, strict=True):
            room = self._model.max_length - job.most
            if room <= 0:
                raise UserError(f"a task generates {job.most} tokens, the model takes {self._model.max_length} in all")
            texts.append(self.tok_encode(request.args[0])[-room:])
        unfinished = list(range(len(jobs)))
        while unfinished:
            scores = self._model.ask([texts[i] + jobs[i].ids for i in unfinished], [[0]] * len(unfinished))
            for i, answer in zip(unfinished, scores, strict=True):
                jobs[i].ids.append(int(answer.likeliest[0]))
            unfinished = [i for i in unfinished if not self._is_finished(jobs[i])]
        return [postprocess_generated_text(self._codec.decode(job.ids), job.until, None) for job in jobs]

    def _is_finished(self, job: "_Generation") -> bool:
        if len(job.ids) >= job.most or job.ids[-1] == self.eot_token_id:
            return True
        text = self._codec.decode(job.ids, False)
        return any(stop in text for stop in job.until)


class _Generation:
    """One text that is being generated."""

    def __init__(self, settings: dict[str, Any], stop_text: str) -> None:
        settings = normalize_gen_kwargs(settings, MAX_GEN_TOKS)
        if settings.get("do_sample") or settings.get("num_beams", 1) != 1:
            raise UserError("a task samples or searches with beams; only greedy generation is built")
        self.until: list[str] = [stop for stop in handle_stop_sequences(settings.get("until"), stop_text) if stop]
        self.most = int(settings["max_gen_toks"])
        self.ids: list[int] = []
