"""config.json to an Architecture and back, by a family's table."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megacpt.config.architecture import Architecture, check_shape
from megacpt.errors import UserError
from megacpt.model.hf.families import family_of
from megacpt.model.hf.table import Family

LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What megatron-core fixes of Llama-3 RoPE scaling; only the factor is free there."""


def architecture_from(config: Mapping[str, Any], where: str) -> Architecture:
    """The shape that a config.json describes; `where` begins each error's sentence.

    Raises:
        UserError: an unsupported architecture, a missing field, or a feature that the model does not have.
    """
    family = family_of(config, where)
    _refuse_features(family, config, where)
    known: dict[str, Any] = dict(family.constants)
    for field in family.fields:
        value = None if field.theirs is None else config.get(field.theirs)
        if value is None:
            if field.derive is None:
                raise UserError(f"{where}: field {field.theirs} is missing; restore the model's own config.json")
            known[field.ours] = field.derive(known)
            continue
        if not _fits(value, field.kind):
            expected = "true or false" if field.kind is bool else "a positive number"
            raise UserError(f"{where}: field {field.theirs} is {value!r}, expected {expected}; correct the file")
        known[field.ours] = not value if field.negated else value
    known["rotary_base"], known["rope_scaling_factor"] = _rotary(family, config, where)
    if family.rotary.percent is not None:
        known["rotary_percent"] = _rotary_percent(family, config, where)
    architecture = Architecture(**known)
    try:
        check_shape(architecture)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return architecture


def _fits(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int | float if kind is float else int) and value > 0


def _refuse_features(family: Family, config: Mapping[str, Any], where: str) -> None:
    for field, accepted in family.fixed.items():
        value = config.get(field, family.absent.get(field))
        if value not in accepted:
            shown = value if isinstance(value, str | int | float) else type(value).__name__
            raise UserError(
                f"{where}: {field} is {shown}, which this model class does not have (it needs {accepted[-1]}); "
                "choose another model"
            )
    window, longest = (
        config.get("sliding_window", family.absent.get("sliding_window")),
        config.get("max_position_embeddings"),
    )
    if window is not None and isinstance(longest, int) and window < longest:
        raise UserError(
            f"{where}: sliding_window is {window}, shorter than max_position_embeddings {longest}, and attention "
            "here is over the whole sequence; choose a model without it"
        )


def _rotary(family: Family, config: Mapping[str, Any], where: str) -> tuple[float, float | None]:
    """Base and Llama-3 scaling factor, from rope_parameters (transformers 5) or the family's and rope_scaling (4)."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(given.get("rope_theta") or config.get(family.rotary.base) or 10_000.0)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise UserError(f"{where}: RoPE scaling of type {kind!r} is not supported, only 'llama3'; choose another model")
    for name, fixed in LLAMA3_SCALING.items():
        if given.get(name) != fixed:
            raise UserError(
                f"{where}: RoPE scaling has {name} {given.get(name)}, and megatron-core fixes it at {fixed:g}; "
                "choose another model"
            )
    if not isinstance(given.get("factor"), int | float):
        raise UserError(f"{where}: RoPE scaling of type 'llama3' lacks its factor; restore the model's own config.json")
    return base, float(given["factor"])


def _rotary_percent(family: Family, config: Mapping[str, Any], where: str) -> float:
    name, default = family.rotary.percent or "", family.rotary.absent_percent
    found = (config.get("rope_parameters") or {}).get("partial_rotary_factor", config.get(name, default))
    if not _fits(found, float) or found > 1:
        raise UserError(f"{where}: field {name} is {found!r}, expected a number above 0, at most 1; correct the file")
    return float(found)


def changes_between(old: Architecture, new: Architecture) -> list[str]:
    """Names of the fields that differ."""
    return [f.name for f in fields(Architecture) if getattr(old, f.name) != getattr(new, f.name)]


def config_for(architecture: Architecture, base: Mapping[str, Any] | None, family: Family) -> dict[str, Any]:
    """A config.json for this shape: `base` with only what differs replaced, or a whole one where there is no base."""
    if base is None:
        config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
        config |= family.absent
        changed = [f.name for f in fields(Architecture)]
    else:
        config = dict(base)
        changed = changes_between(architecture_from(base, "config.json"), architecture)
    for field in family.fields:
        if field.theirs is not None and field.ours in changed:
            value = getattr(architecture, field.ours)
            config[field.theirs] = not value if field.negated else value
    if "rotary_base" in changed or "rope_scaling_factor" in changed:
        config.pop("rope_parameters", None)
        factor = architecture.rope_scaling_factor
        config[family.rotary.base] = architecture.rotary_base
        if family.rotary.percent is not None:
            config[family.rotary.percent] = architecture.rotary_percent
        config["rope_scaling"] = factor and {"rope_type": "llama3", "factor": factor, **LLAMA3_SCALING}
    if "sliding_window" in family.absent and base is None:
        config["sliding_window"] = None
    return config
