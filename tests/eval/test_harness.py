"""The live model answers lm_eval's requests as lm_eval's own `hf` model does, request by request, at any layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megacpt.config.tree import Model
from megacpt.eval.live import LiveModel
from megacpt.eval.scoring import ScoringFailed
from megacpt.runtime.setup import Layout, setup
from megacpt.train.live import codec_of, hf_subject
from tests.eval import readers
from tests.ranks import run_ranks

pytest.importorskip("lm_eval", reason="lm_eval is not installed; pip install 'megacpt[eval]'")

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "vp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "tp2-dp2": {"tensor_model_parallel_size": 2, "ranks": 4},
    "cp2-tp2-sp": {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True, "ranks": 4},
}


def live_model(folder: Path, layout: dict[str, Any], batch_tokens: int = 256) -> LiveModel:
    """On the groups of this rank."""
    model = Model(**{key: value for key, value in layout.items() if key != "ranks"})
    tp, pp, vp, cp = (
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.virtual_pipeline_model_parallel_size,
        model.context_parallel_size,
    )
    setup(Layout(dist.get_world_size(), tp, pp, vp, cp), seed=0, threads=1)
    return LiveModel(hf_subject(folder, "fp32").build(model), readers.MAX_LENGTH, batch_tokens)


def ranks_of(layout: dict[str, Any]) -> int:
    return layout.get("ranks") or layout.get("tensor_model_parallel_size", 1) * layout.get(
        "pipeline_model_parallel_size", 1
    )


def answers(folder: Path, layout: dict[str, Any]) -> dict[str, list[Any]] | None:
    from megacpt.eval.harness import MegacptLM

    model = live_model(folder, layout)
    codec = codec_of(hf_subject(folder, "fp32"), None, folder)
    found = model.lead(lambda: readers.all_answers(MegacptLM(model, codec)))
    assert all(chunk.training for chunk in model.chunks)
    return found


@pytest.fixture(scope="module")
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder, and what `hf` answers."""
    folder = readers.make_reader(tmp_path_factory.mktemp("reader"), bos=request.param)
    return folder, readers.all_answers(readers.reference(folder))


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        *(pytest.param(True, name, id=f"bos-{name}") for name in LAYOUTS),
        # The tokenizer is asked by `MegacptLM` alone; what is laid out over ranks sees ids.
        *(pytest.param(False, name, id=f"no-bos-{name}") for name in ("one", "tp2-sp")),
    ],
    indirect=["reader"],
)
def test_answers_are_those_of_hf(name: str, reader: tuple[Path, dict[str, Any]]) -> None:
    folder, expected = reader
    first, *others = run_ranks(answers, ranks_of(LAYOUTS[name]), folder, LAYOUTS[name])
    assert others == [None] * len(others)
    for kind, wanted in expected.items():
        assert len(first[kind]) == len(wanted)
    logprobs, greedy = zip(*first["loglikelihood"], strict=True)
    wanted_logprobs, wanted_greedy = zip(*expected["loglikelihood"], strict=True)
    np.testing.assert_allclose(logprobs, wanted_logprobs, rtol=0, atol=1e-4)
    assert greedy == wanted_greedy
    np.testing.assert_allclose(first["rolling"], expected["rolling"], rtol=0, atol=1e-3)
    assert first["generated"] == expected["generated"]


def fails_then_answers(folder: Path, layout: dict[str, Any]) -> tuple[str, int]:
    """A forward pass that raises everywhere, a driver that raises, then an ordinary question."""
    model = live_model(folder, layout)
    head = next(chunk for chunk in model.chunks)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    def work() -> str:
        handle = head.register_forward_pre_hook(broken)
        try:
            model.ask([[1, 2, 3]], [[4]])
        except ScoringFailed as error:
            return str(error)
        finally:
            handle.remove()
        return "no failure"

    if dist.get_rank():
        handle = head.register_forward_pre_hook(broken)
        model.lead(work)
        handle.remove()
        told = ""
    else:
        told = model.lead(work) or ""

    def mistake() -> None:
        raise ValueError("a bad prompt")

    try:
        model.lead(mistake)
    except ValueError:
        assert dist.get_rank() == 0
    scores = model.lead(lambda: model.ask([[1, 2, 3]], [[4]]))
    return told, 0 if scores is None else len(scores)


def test_a_failure_is_agreed_on_and_the_next_question_answered(tmp_path: Path) -> None:
    folder = readers.make_reader(tmp_path, bos=True)
    first, second = run_ranks(fails_then_answers, 2, folder, {"ranks": 2})
    assert "out of memory" in first[0]
    assert first[1] == 1
    assert second == ("", 0)


def counted(folder: Path) -> list[int]:
    """Tokens that go through the model for four answers to one question, and for one."""
    model = live_model(folder, {}, batch_tokens=4096)
    seen: list[int] = []
    model.chunks[0].embedding.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    context = list(range(5, 45))
    for ends in ([[1, 2, 3], [1, 4, 5], [9, 9], [7, 8]], [[1, 2, 3]], [[1], [2], [3], [4]]):
        model.lead(lambda ends=ends: model.ask([context + end[:-1] for end in ends], ends))  # type: ignore[misc]
    return seen


def test_a_shared_context_is_computed_once(tmp_path: Path) -> None:
    folder = readers.make_reader(tmp_path, bos=True)
    (seen,) = run_ranks(counted, 1, folder)
    # 40 of context; 1 2 | 4 | 9 | 7 after it; equal inputs once.
    assert seen == [45, 42, 40]


def test_torch_is_the_reference_of_the_split_softmax() -> None:
    found = run_ranks(split_scores, 3)
    torch.manual_seed(1)
    logits, targets = torch.randn(50, 33), torch.randint(0, 30, (50,))
    logits[:, 30:] = -torch.inf
    logits[3, 7] = logits[3, 20] = 9.0
    expected = logits.log_softmax(1)
    for scores in found:
        torch.testing.assert_close(scores[0], expected.gather(1, targets[:, None])[:, 0].double(), rtol=0, atol=1e-6)
        assert scores[1].long().tolist() == logits.argmax(1).tolist()
        assert scores[1, 3] == 7


def split_scores() -> torch.Tensor:
    from megacpt.eval.scoring import vocabulary_parallel_scores

    torch.manual_seed(1)
    logits, targets = torch.randn(50, 33), torch.randint(0, 30, (50,))
    logits[:, 30:] = -torch.inf
    logits[3, 7] = logits[3, 20] = 9.0
    part = logits.split(11, 1)[dist.get_rank()]
    assert dist.group.WORLD is not None
    return vocabulary_parallel_scores(part, targets, dist.group.WORLD)
