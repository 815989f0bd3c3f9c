"""What Transformer Engine's modules have in a checkpoint beside weights: delayed scaling's maxima, pickled."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ALLOWED = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
"""Without it the package (2.20) refuses every pickle, whoever wrote it."""


def is_engine_state(key: str) -> bool:
    """Whether a key of a state dict, or of a checkpoint, is of this kind."""
    return "_extra_state" in key


def without_engine_state(sharded: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sharded state dicts by chunk that ask for none: its history starts anew, and nobody's pickle is opened."""
    return {
        name: {key: entry for key, entry in chunk.items() if not is_engine_state(key)}
        for name, chunk in sharded.items()
    }


@contextmanager
def own_engine_state() -> Iterator[None]:
    """Let the modules take what this very run has written."""
    before = os.environ.get(ALLOWED)
    os.environ[ALLOWED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ALLOWED]
        else:
            os.environ[ALLOWED] = before
