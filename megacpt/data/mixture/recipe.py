"""Mixtures by name: the rates of known pre-training mixtures, what a domain replaces in them, and replay.

Everything is a share of the samples, exact, before it becomes whole samples in `megacpt.data.mixture.solve`.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import inf, nan

from megacpt.errors import UserError


@dataclass(frozen=True)
class Preset:
    """A pre-training mixture: parts of each source (any unit), and where they are published."""

    parts: Mapping[str, str]
    source: str

    def rates(self) -> dict[str, Fraction]:
        """Shares that sum to 1."""
        parts = {name: Fraction(part) for name, part in self.parts.items()}
        return {name: part / sum(parts.values()) for name, part in parts.items()}


PRESETS = {
    "llama1": Preset(
        {
            "common_crawl": "67.0",
            "c4": "15.0",
            "github": "4.5",
            "wikipedia": "4.5",
            "books": "4.5",
            "arxiv": "2.5",
            "stackexchange": "2.0",
        },
        "sampling proportions in per cent, Touvron et al. 2023 (arXiv 2302.13971), table 1",
    ),
    "redpajama": Preset(
        {
            "common_crawl": "878",
            "c4": "175",
            "github": "59",
            "books": "26",
            "arxiv": "28",
            "wikipedia": "24",
            "stackexchange": "20",
        },
        "tokens in billions, RedPajama-Data-1T (Together, 2023)",
    ),
    "slimpajama": Preset(
        {
            "common_crawl": "52.2",
            "c4": "26.7",
            "github": "5.2",
            "books": "4.2",
            "arxiv": "4.6",
            "wikipedia": "3.8",
            "stackexchange": "3.3",
        },
        "per cent, SlimPajama-627B (Soboleva et al., 2023)",
    ),
    "olmo2": Preset(
        {
            "dclm": "3710",
            "starcoder": "83.0",
            "pes2o": "58.6",
            "arxiv": "20.8",
            "openwebmath": "12.2",
            "algebraic_stack": "11.8",
            "wikipedia": "3.7",
        },
        "tokens in billions of the first stage (OLMo-mix-1124), OLMo 2 (arXiv 2501.00656)",
    ),
}


@dataclass(frozen=True)
class Recipe:
    """What section data.mixture says of the shares.

    Attributes:
        preset: a name in PRESETS, or None: sources' own weights.
        replace: sources of the preset whose share goes to `domain`.
        domain: the source of the new domain (`with`).
        replay: share of all the others together, in [0, 1]; the domain has the rest.
    """

    preset: str | None = None
    replace: tuple[str, ...] = ()
    domain: str | None = None
    replay: float | None = None


def shares(recipe: Recipe, weights: Mapping[str, float | None], tokens: Mapping[str, int]) -> dict[str, float | None]:
    """The weight of every source.

    Without preset and replay these are the sources' own. With replay but no preset, the others share it by their
    weights or, where none has one, by their tokens.

    Args:
        weights: of every source, as the configuration has them.
        tokens: of every source.

    Raises:
        UserError: an unknown name, a contradiction, or a source that the preset asks for and that is not there.
    """
    domain = recipe.domain
    if domain is not None and domain not in weights:
        raise UserError(f"data.mixture.with: there is no source '{domain}'; {_nearest(domain, weights)}")
    if domain is None and (recipe.replace or recipe.replay is not None):
        key = "replace" if recipe.replace else "replay"
        raise UserError(f"data.mixture.{key} needs data.mixture.with: the source of the new domain")
    if recipe.preset is not None:
        return _of_preset(recipe, weights)
    if recipe.replace:
        raise UserError("data.mixture.replace needs data.mixture.preset: the mixture in which something is replaced")
    if recipe.replay is None or domain is None:
        return dict(weights)
    if weights[domain] is not None:
        raise UserError(
            f"data.sources.{domain}.weight: data.mixture.replay already says how much the others get; unset one of them"
        )
    others = {name: weight for name, weight in weights.items() if name != domain}
    given = [name for name, weight in others.items() if weight is not None]
    if given and len(given) < len(others):
        without = next(name for name in others if name not in given)
        raise UserError(f"data.sources.{without}.weight is not set, others' are; give all of them a weight, or none")
    parts = {name: Fraction(str(others[name])) if given else Fraction(tokens[name]) for name in others}
    return _replayed(recipe, domain, parts)


def _of_preset(recipe: Recipe, weights: Mapping[str, float | None]) -> dict[str, float | None]:
    assert recipe.preset is not None
    own = [name for name, weight in weights.items() if weight is not None]
    if own:
        raise UserError(f"data.sources.{own[0]}.weight: data.mixture.preset brings the rates; unset one of them")
    rates = PRESETS[recipe.preset].rates()
    for name in recipe.replace:
        if name not in rates:
            raise UserError(
                f"data.mixture.replace: preset {recipe.preset} has no source '{name}'; {_nearest(name, rates)}"
            )
    twice = [name for number, name in enumerate(recipe.replace) if name in recipe.replace[:number]]
    if twice:
        raise UserError(f"data.mixture.replace names '{twice[0]}' twice; name each source once")
    kept = {name: rate for name, rate in rates.items() if name not in recipe.replace}
    absent = [name for name in kept if name not in weights]
    if absent:
        share = float(sum(kept[name] for name in absent))
        raise UserError(
            f"data.mixture: preset {recipe.preset} has {', '.join(absent)} ({share:.1%} of it), which data.sources "
            "lacks; declare them, or list them in data.mixture.replace so that the domain takes their part"
        )
    foreign = [name for name in weights if name not in kept and name != recipe.domain]
    if foreign:
        raise UserError(
            f"data.sources.{foreign[0]}: preset {recipe.preset} does not have it; {_nearest(foreign[0], rates)}, or "
            "name it in data.mixture.with"
        )
    if recipe.domain is not None and recipe.domain in kept:
        raise UserError(f"data.mixture.with: '{recipe.domain}' is a source of preset {recipe.preset}; name another one")
    if recipe.domain is None:
        return {name: float(kept[name]) for name in weights}
    if recipe.replay is not None:
        return _replayed(recipe, recipe.domain, {name: kept[name] for name in weights if name != recipe.domain})
    if not recipe.replace:
        raise UserError(
            f"data.mixture: nothing says how much '{recipe.domain}' gets; list what it replaces in preset "
            f"{recipe.preset}, or set data.mixture.replay"
        )
    domain = sum(rates[name] for name in recipe.replace)
    return {name: float(domain if name == recipe.domain else kept[name]) for name in weights}


def _replayed(recipe: Recipe, domain: str, parts: Mapping[str, Fraction]) -> dict[str, float | None]:
    """The domain's share and the others', who divide the replay in proportion to `parts`."""
    replay, whole = Fraction(str(recipe.replay)), sum(parts.values())
    if replay and not whole:
        raise UserError("data.mixture.replay: there is no other source to replay, or all their weights are 0")
    return {domain: float(1 - replay), **{name: float(replay * part / (whole or 1)) for name, part in parts.items()}}


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"the nearest is '{near[0]}'" if near else "there is none at all"


def named_blend(blend: Iterable[str | float]) -> dict[str, tuple[float, str]]:
    """Megatron's `W1 P1 W2 P2 ...` (or `P1`, alone) as name -> (weight, prefix); a name is the end of its prefix.

    Raises:
        UserError: weights and prefixes do not alternate, a weight is no number of 0 or more, all are 0, or a prefix
            comes twice.
    """
    parts = list(blend)
    if len(parts) == 1:
        parts = ["1", *parts]
    if not parts or len(parts) % 2:
        raise UserError("data.data_path: give WEIGHT PREFIX WEIGHT PREFIX ..., or one PREFIX")
    named: dict[str, tuple[float, str]] = {}
    for weight, prefix in zip(parts[::2], map(str, parts[1::2]), strict=True):
        try:
            number = float(weight)
        except ValueError:
            number = nan
        if not 0 <= number < inf:
            raise UserError(f"data.data_path: {weight!r} before {prefix} is not a weight; give a number of 0 or more")
        if prefix in (known for _, known in named.values()):
            raise UserError(f"data.data_path: {prefix} stands twice; give each dataset once")
        short = prefix.rstrip("/").rpartition("/")[2].removesuffix("_document").removesuffix("_text")
        named[next(name for name in (short, prefix, f"./{prefix}") if name not in named)] = (number, prefix)
    if not any(number for number, _ in named.values()):
        raise UserError("data.data_path: every weight is 0; give at least one dataset a positive one")
    return named
