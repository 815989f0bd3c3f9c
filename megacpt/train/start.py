"""Weights at iteration 0: drawn from a seed, loaded from a checkpoint, or imported from a Hugging Face folder."""

from collections.abc import Sequence

import numpy as np
import torch

from megacpt.data.samples.blended import BlendedDataset
from megacpt.model.gpt import LanguageModel
from megacpt.model.hf.fill import fill_weights
from megacpt.model.hf.gate import check_import
from megacpt.model.init import draw_weights
from megacpt.train.checkpoint import find_checkpoint, load_weights
from megacpt.train.exchange import GATE_SHAPE
from megacpt.train.plan import Plan


def initial_weights(plan: Plan, chunks: Sequence[LanguageModel]) -> str | None:
    """Draw, load or import; returns what there is to say about an import.

    Raises:
        UserError: the checkpoint does not fit, or the gate refuses the import.
    """
    init = plan.config.init
    if init.hf is not None:
        return _import_weights(plan, chunks)
    if init.checkpoint is None:
        draw_weights(chunks, plan.architecture, plan.config.train.seed, plan.config.model.init_method_std)
        return None
    folder = find_checkpoint(init.checkpoint)
    assert folder is not None, "the plan has found it"
    load_weights(folder, chunks)
    return None


def _import_weights(plan: Plan, chunks: Sequence[LanguageModel]) -> str:
    assert plan.origin is not None
    source = plan.origin.source
    assert source is not None, "init.hf has been opened"
    fill_weights(chunks, source)
    try:
        if not plan.config.init.gate:
            return f"NO GATE: whether the weights of {source.folder} were imported rightly has not been checked"
        dataset = BlendedDataset(plan.mixture, plan.corpora, plan.architecture.vocab_size)
        sequences, length = GATE_SHAPE
        tokens = np.stack([dataset.sample(k).tokens[:-1][:length] for k in range(sequences)])
        return str(check_import(chunks, source, plan.architecture, torch.from_numpy(tokens)))
    finally:
        source.close()
