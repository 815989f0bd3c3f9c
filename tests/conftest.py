"""What several test files share: the folder of real text, tools loaded as modules, no time limit on examples."""

import importlib.util
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest

os.environ.pop("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None)  # images may set it; torch reads it when it is imported

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("MEGACPT_SHARED") or REPOSITORY.parent / "shared")
"""Real corpora and tokenizers, beside the checkout or where MEGACPT_SHARED says."""

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")


LONG = {
    "test_agreement.py",
    "test_bench.py",
    "test_interpreted.py",
    "test_launch.py",
    "test_resume.py",
    "test_train.py",
}
"""Files of few tests that take long: begun last, as their number says, one would be left to one worker alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, then those of many tests: with `--no-loadscope-reorder`, the order that workers take."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONG, -tests[item.path]))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real corpora beside the checkout, or where MEGACPT_SHARED says; skips the test without it."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no real text at {SHARED}; set MEGACPT_SHARED to the folder that holds data/")
    return SHARED


@pytest.fixture(scope="session")
def load_tool() -> Callable[[str], ModuleType]:
    """Import tools/NAME.py, which belongs to no package, under a name that hides nobody's."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"megacpt_tool_{name}", REPOSITORY / "tools" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
