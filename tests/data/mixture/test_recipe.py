from fractions import Fraction
from typing import Any

import pytest

from megacpt.data.mixture.recipe import PRESETS, Recipe, named_blend, shares
from megacpt.errors import UserError

LLAMA = ("github", "wikipedia", "books", "arxiv", "stackexchange")
TOKENS = {name: 1000 for name in (*LLAMA, "medical", "common_crawl", "c4")}


def weights(*names: str, **given: float) -> dict[str, float | None]:
    return {name: given.get(name) for name in names}


@pytest.mark.parametrize("name", PRESETS)
def test_rates_sum_to_one(name: str):
    assert sum(PRESETS[name].rates().values()) == 1
    assert PRESETS[name].source


def test_the_paper_s_mixture():
    recipe = Recipe("llama1", ("common_crawl", "c4"), "medical")
    assert shares(recipe, weights("medical", *LLAMA), TOKENS) == {
        "medical": 0.82,
        "github": 0.045,
        "wikipedia": 0.045,
        "books": 0.045,
        "arxiv": 0.025,
        "stackexchange": 0.02,
    }


def test_replay_scales_the_preset():
    result = shares(Recipe("llama1", ("common_crawl", "c4"), "medical", 0.1), weights("medical", *LLAMA), TOKENS)
    assert result["medical"] == 0.9
    assert result["github"] == float(Fraction("0.1") * Fraction(45, 180))
    assert sum(map(Fraction, (str(v) for v in result.values()))) == 1


def test_replay_without_a_preset_goes_by_weights_or_by_tokens():
    replay = Recipe(domain="medical", replay=0.25)
    given = {"medical": None, "web": 3.0, "code": 1.0}
    assert shares(replay, given, {"medical": 5, "web": 1, "code": 1}) == {
        "medical": 0.75,
        "web": 0.1875,
        "code": 0.0625,
    }
    bare = {"medical": None, "web": None, "code": None}
    assert shares(replay, bare, {"medical": 5, "web": 300, "code": 100}) == {
        "medical": 0.75,
        "web": 0.1875,
        "code": 0.0625,
    }


def test_without_a_recipe_weights_are_the_sources_own():
    assert shares(Recipe(), {"a": 0.3, "b": None}, {"a": 1, "b": 1}) == {"a": 0.3, "b": None}


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        (Recipe(domain="medicla", replay=0.1), weights("medical", "web"), r"with: .*'medicla'; the nearest is 'med"),
        (Recipe(replay=0.1), weights("medical"), r"mixture\.replay needs data\.mixture\.with"),
        (Recipe("llama1", ("c4",)), weights("medical"), r"mixture\.replace needs data\.mixture\.with"),
        (Recipe(None, ("c4",), "medical"), weights("medical"), r"replace needs data\.mixture\.preset"),
        (Recipe("llama1", ("c5",), "medical"), weights("medical"), r"llama1 has no source 'c5'; the nearest is 'c4'"),
        (Recipe("llama1", ("c4", "common_crawl", "c4"), "medical"), weights("medical", *LLAMA),
         r"data\.mixture\.replace names 'c4' twice"),
        (Recipe("llama1", ("c4", "common_crawl"), "medical"), weights("medical", "github"),
         r"llama1 has wikipedia, books, arxiv, stackexchange \(13\.5% of it\), which data\.sources lacks"),
        (Recipe("llama1", ("c4", "common_crawl"), "medical"), weights("medical", *LLAMA, "law"),
         r"sources\.law: preset llama1 does not have it"),
        (Recipe("llama1", (), "medical"), weights("medical", "common_crawl", "c4", *LLAMA), "nothing says how much"),
        (Recipe("llama1", ("c4",), "arxiv"), weights("common_crawl", *LLAMA), "'arxiv' is a source of preset"),
        (Recipe("llama1", ("c4",), "medical"), weights("medical", *LLAMA, medical=0.5), "medical.weight: .* brings"),
        (Recipe(None, (), "medical", 0.1), weights("medical", "web", medical=0.5), "medical.weight: .*replay already"),
        (Recipe(None, (), "medical", 0.1), weights("medical", "web", "code", web=1.0), "code.weight is not set"),
        (Recipe(None, (), "medical", 0.1), weights("medical"), "no other source to replay"),
    ],
)  # fmt: skip
def test_mistakes_are_named(recipe: Recipe, given: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        shares(recipe, given, TOKENS | {"web": 10, "code": 10, "law": 10})


def test_megatron_s_blend():
    assert named_blend(["0.3", "data/web_text_document", "0.7", "data/med_text_document"]) == {
        "web": (0.3, "data/web_text_document"),
        "med": (0.7, "data/med_text_document"),
    }
    assert named_blend(["data/web"]) == {"web": (1.0, "data/web")}
    assert list(named_blend([1, "a/x", 2, "b/x", 3, "x"])) == ["x", "b/x", "./x"]
    for blend, message in [
        (["1", "a", "2"], "WEIGHT PREFIX"),
        (["a", "1"], "'a' before 1 is not a weight"),
        (["-1", "a", "2", "b"], "'-1' before a is not a weight; give a number of 0 or more"),
        (["nan", "a", "2", "b"], "'nan' before a is not a weight"),
        (["inf", "a", "2", "b"], "'inf' before a is not a weight"),
        (["1", "a/x", "1", "a/x"], "a/x stands twice"),
        (["0", "a", "0.0", "b"], r"data\.data_path: every weight is 0; give at least one dataset a positive one"),
        (["1", "a/x", "1", "b/x", "2", "b/x"], "b/x stands twice"),
        ([], "WEIGHT PREFIX"),
    ]:
        with pytest.raises(UserError, match=message):
            named_blend(blend)
