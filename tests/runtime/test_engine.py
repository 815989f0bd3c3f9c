"""Which layers a run has is chosen by a rule and said; what the machine lacks is refused in one sentence."""

import pytest

from megacpt.config.load import config_from
from megacpt.config.tree import Config
from megacpt.errors import UserError
from megacpt.runtime import engine
from megacpt.runtime.engine import check_available, check_card, choose_transformer_impl


def test_what_was_asked_for_is_never_changed() -> None:
    for asked in ("local", "transformer_engine"):
        for on_gpu in (False, True):
            assert choose_transformer_impl(asked, on_gpu=on_gpu).transformer_impl == asked


def test_without_a_wish_the_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(choose_transformer_impl(None, on_gpu=False)) == "local (on a CPU)"
    monkeypatch.setattr(engine, "import_problem", lambda package: None)
    assert choose_transformer_impl(None, on_gpu=True).engine
    monkeypatch.setattr(engine, "import_problem", lambda package: "not installed")
    assert (
        str(choose_transformer_impl(None, on_gpu=True)) == "local (transformer_engine does not import: not installed)"
    )


def test_a_package_that_does_not_import_says_so() -> None:
    assert engine.import_problem("torch") is None
    assert engine.import_problem("no_such_package_at_all") == "not installed"


@pytest.mark.parametrize(
    ("recipe", "capability", "words"),
    [
        ("mxfp8", (9, 0), ["mxfp8", "10.0 (Blackwell)", "delayed or tensorwise or blockwise"]),
        ("blockwise", (8, 9), ["blockwise", "9.0 (Hopper)", "delayed or tensorwise"]),
        ("delayed", (8, 0), ["delayed", "8.9 (Ada)", "model.fp8 to null"]),
    ],
)
def test_a_card_too_old_for_the_recipe(recipe: str, capability: tuple[int, int], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_card(recipe, capability, "the card")
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_card_that_can() -> None:
    check_card("blockwise", (9, 0), "H100")
    check_card("mxfp8", (10, 3), "B300")


def configuration(**model: object) -> Config:
    tree = {
        "model": {"preset": "tiny", **model},
        "data": {"seq_length": 8},
        "train": {"global_batch_size": 1},
        "optimizer": {"lr": 1.0},
        "save": {"dir": "x"},
    }
    return config_from(tree, "test")


def test_what_the_machine_lacks_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "import_problem", lambda package: "OSError: libcudart.so.13: cannot open")
    asked = configuration(transformer_impl="transformer_engine")
    with pytest.raises(UserError, match=r"transformer_engine does not import \(OSError: libcudart"):
        check_available(asked, choose_transformer_impl("transformer_engine", on_gpu=True))
    fused = configuration(gradient_accumulation_fusion=True)
    local = choose_transformer_impl("local", on_gpu=True)
    monkeypatch.setattr(engine, "apex_adds_gradients", lambda: False)
    with pytest.raises(UserError, match="install apex with --cpp_ext --cuda_ext"):
        check_available(fused, local)
    check_available(configuration(), local)
