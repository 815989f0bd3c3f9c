"""What every rank of a multi-rank test imports; loaded once into the server from which ranks are forked."""

import gc
import warnings
from contextlib import suppress
from importlib import import_module

warnings.simplefilter("ignore")

from megacpt.errors import UserError  # noqa: E402
from megacpt.runtime.compiler import load_megatron_core  # noqa: E402

load_megatron_core()

# What test modules import, then what a rank does late: an optimizer, a checkpoint, the gate of an import, tasks.
import hypothesis  # noqa: E402, F401
import megatron.core.dist_checkpointing.strategies.fully_parallel  # noqa: E402
import megatron.core.models.mimo.optimizer  # noqa: E402, F401
import pytest  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401

import megacpt.train.build  # noqa: E402
import megacpt.train.loop  # noqa: E402
import megacpt.train.planning  # noqa: E402, F401

for name in (
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "transformers.convert_slow_tokenizer",
    "megacpt.eval.harness",
):
    # Of optional packages: a test that needs one says so itself. None of them starts a thread, which a fork would lose.
    with suppress(ImportError, UserError):
        import_module(name)

# A rank that collected this as garbage would visit, and so copy, every page of it.
gc.freeze()
