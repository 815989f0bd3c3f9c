"""A changed mixture on resume: what changed, in words, and where the new mixture takes over.

A run that resumes solves its configuration from `start_of` the checkpoint's fingerprint. If `differences` finds the
same mixture, that is the one to train on. If not, and the change is meant, it solves again from `continuation`.
"""

from collections.abc import Mapping
from typing import Any

from megacpt.data.mixture.mixture import Start
from megacpt.errors import UserError


def start_of(fingerprint: Mapping[str, Any]) -> Start:
    """Where the fingerprinted mixture began; to solve the same mixture again."""
    return Start(**fingerprint["start"])


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What makes the sequence of samples another one, a sentence each; empty for equal mixtures.

    Args:
        old, new: `Mixture.fingerprint()`, perhaps back from JSON.
    """
    keys = ("algorithm", "seq_length", "seed", "pass_samples")
    changes = [f"{key} {old.get(key)} -> {new[key]}" for key in keys if old.get(key) != new[key]]
    before, after = old["sources"], new["sources"]
    changes += [f"source '{name}': removed" for name in before if name not in after]
    changes += [f"source '{name}': added with {_demand(after[name])}" for name in after if name not in before]
    for name in (name for name in after if name in before):
        corpus = _corpus_change(before[name], after[name])
        changes += [f"source '{name}': {corpus}"] if corpus else []
        if any(before[name][key] != after[name][key] for key in ("epochs", "weight")):
            changes.append(f"source '{name}': {_demand(before[name])} -> {_demand(after[name])}")
        for key in ("redraw", "repeat") if new["pass_samples"] is not None else ():
            if before[name].get(key) != after[name][key]:
                changes.append(f"source '{name}': {key} {before[name].get(key)} -> {after[name][key]}")
    if old.get("shifts", []) != new["shifts"]:
        changes.append("the weights that change within the run are others, or change elsewhere")
    if old["start"] != new["start"]:
        changes.append(f"the mixture begins at sample {old['start']['sample']:,} -> {new['start']['sample']:,}")
    return changes


def continuation(old: Mapping[str, Any], new: Mapping[str, Any], at: Start) -> Start:
    """Where the `new` mixture takes over from the `old` one so that no sample is lost or repeated.

    Args:
        old, new: fingerprints of the two mixtures.
        at: where the old one is: `old_mixture.at(samples of the run so far)`.

    Raises:
        UserError: the change reshuffles or recuts a corpus of which a part has been seen.
    """
    for key, remedy in (("seq_length", "keep it"), ("seed", "keep it"), ("algorithm", "use the former version")):
        if old[key] != new[key]:
            raise UserError(
                f"{key} {old[key]} -> {new[key]}: passes under way cannot go on under it without losing or repeating "
                f"samples; {remedy}, or start a new run from this run's weights (init.checkpoint)"
            )
    for name, source in new["sources"].items():
        corpus = _corpus_change(old["sources"].get(name, source), source)
        if corpus and at.consumed.get(name, 0):
            raise UserError(
                f"source '{name}': {corpus}; its pass under way cannot go on in another corpus; declare the new "
                "corpus under another name"
            )
    return at


def _demand(source: Mapping[str, Any]) -> str:
    """What the configuration asks of the source."""
    return f"weight {source['weight']}" if source["epochs"] is None else f"epochs {source['epochs']}"


def _corpus_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """How the corpus differs, or nothing."""
    sizes = [f"{source['documents']:,} documents with {source['tokens']:,} tokens" for source in (old, new)]
    if sizes[0] != sizes[1]:
        return " -> ".join(sizes)
    return "" if old["digest"] == new["digest"] else "its content changed"
