"""Tests of operations run on a CPU, where TRITON_INTERPRET decides what runs, and on a GPU where there is one."""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.compare import use_small_launches


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch fills what `torch.empty` returns with NaN, so that an element nobody wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 elements, so that rows of a small test span several and end inside one."""
    use_small_launches(monkeypatch.setattr)
