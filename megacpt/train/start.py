"""Weights at iteration 0: drawn from a seed, loaded from a checkpoint, or imported from a Hugging Face folder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megacpt.data.samples.blended import BlendedDataset
from megacpt.errors import UserError
from megacpt.model.build import without_fp8, without_userbuffers
from megacpt.model.full_precision import Originals, unquantized
from megacpt.model.gpt import LanguageModel
from megacpt.model.hf.fill import fill_weights
from megacpt.model.hf.gate import check_import
from megacpt.model.hf.source import Source
from megacpt.model.init import draw_weights
from megacpt.train.checkpoint import find_checkpoint, load_weights
from megacpt.train.exchange import GATE_SHAPE
from megacpt.train.plan import Plan
from megacpt.train.weight_update import BaseWeights, check_base, record_base, recorded_origin


def initial_weights(plan: Plan, chunks: Sequence[LanguageModel], originals: Originals) -> str | None:
    """Draw, load or import; returns what there is to say about an import.

    `originals` gets what the parameters cannot hold of it.

    Raises:
        UserError: the checkpoint does not fit, or the gate refuses the import.
    """
    init = plan.config.init
    if init.hf is not None:
        return _import_weights(plan, chunks, originals)
    if init.checkpoint is None:
        seed, std = plan.config.train.seed, plan.config.model.init_method_std
        draw_weights(chunks, plan.architecture, seed, std, originals)
        return None
    folder = find_checkpoint(init.checkpoint)
    assert folder is not None, "the plan has found it"
    load_weights(folder, chunks, originals)
    return None


def base_weights(plan: Plan, chunks: Sequence[LanguageModel]) -> BaseWeights:
    """A copy of the weights at iteration 0; when the run goes on, they are first read or drawn again into `chunks`.

    Raises:
        UserError: the weights that the run began from are gone, or are others now.
    """
    folder, init = Path(plan.config.save.dir), plan.config.init
    if plan.resume is None:
        base = BaseWeights.copy(chunks)
        norms = base.norms()
        if dist.get_rank() == 0:
            record_base(folder, _origin_of_weights(plan), norms)
        return base
    origin = recorded_origin(folder) or _origin_of_weights(plan)
    if init.hf is not None:
        source = Source(init.hf)
        fill_weights(chunks, source)
        source.close()
    elif init.checkpoint is not None:
        load_weights(_existing(origin), chunks)
    else:
        draw_weights(chunks, plan.architecture, plan.config.train.seed, plan.config.model.init_method_std)
    base = BaseWeights.copy(chunks)
    check_base(folder, base)
    return base


def _origin_of_weights(plan: Plan) -> str:
    init = plan.config.init
    if init.checkpoint is None:
        return init.hf if init.hf is not None else f"seed {plan.config.train.seed}"
    return str(find_checkpoint(init.checkpoint) or init.checkpoint)


def _existing(origin: str) -> Path:
    if not Path(origin).is_dir():
        raise UserError(
            f"{origin}: diagnostics.weight_update compares with the weights that the run began from, and they are "
            "gone; restore them, or unset diagnostics.weight_update"
        )
    return Path(origin)


def _import_weights(plan: Plan, chunks: Sequence[LanguageModel], originals: Originals) -> str:
    assert plan.origin is not None
    source = plan.origin.source
    assert source is not None, "init.hf has been opened"
    fill_weights(chunks, source, originals=originals)
    try:
        if not plan.config.init.gate:
            return f"NO GATE: whether the weights of {source.folder} were imported rightly has not been checked"
        dataset = BlendedDataset(plan.mixture, plan.corpora, plan.architecture.vocab_size)
        sequences, length = GATE_SHAPE
        tokens = np.stack([dataset.sample(k).tokens[:-1][:length] for k in range(sequences)])
        with without_fp8(chunks), without_userbuffers(chunks), unquantized(chunks, originals):
            return str(check_import(chunks, source, plan.architecture, torch.from_numpy(tokens)))
    finally:
        source.close()
