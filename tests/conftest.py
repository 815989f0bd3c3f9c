"""What several test files share: the folder of real text, and tools loaded as modules."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real corpora beside the checkout, or where MEGACPT_SHARED says; skips the test without it."""
    folder = Path(os.environ.get("MEGACPT_SHARED") or REPOSITORY.parent / "shared")
    if not (folder / "data").is_dir():
        pytest.skip(f"no real text at {folder}; set MEGACPT_SHARED to the folder that holds data/")
    return folder


@pytest.fixture(scope="session")
def load_tool() -> Callable[[str], ModuleType]:
    """Import tools/NAME.py without putting the repository on sys.path, where kernels/ would hide another package."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"megacpt_tool_{name}", REPOSITORY / "tools" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
