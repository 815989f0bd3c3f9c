"""What a run's folder says beside its metrics: configuration, provenance, how far it wants to go, who writes to it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megacpt.errors import UserError

PROGRESS = re.compile(r"\] iteration +\d+/ *(\d+) \|")
TAIL = 65536
"""Bytes of train.log's end that surely hold a progress line."""


@dataclass(frozen=True)
class Provenance:
    """What a run was.

    Attributes:
        config: dotted key -> value, the resolved configuration.
        announced: what the run said of itself before its first step.
        checkpoint: megacpt.json of its newest checkpoint; empty before there is one.
        last_iteration: where it will stop; None where that is not known.
        running: whether a process holds the run's lock; None where the system does not say.
    """

    config: dict[str, Any]
    announced: str
    checkpoint: dict[str, Any]
    last_iteration: int | None
    running: bool | None

    @property
    def seed(self) -> int | None:
        """The seed it was trained with."""
        seed = self.config.get("train.seed")
        return seed if isinstance(seed, int) else None


def read_provenance(folder: Path) -> Provenance:
    """Read what there is.

    Raises:
        UserError: config.yaml is damaged.
    """
    config = _config(folder / "config.yaml")
    head, tail = _ends(folder / "train.log")
    totals = PROGRESS.findall(tail)
    planned = config.get("train.train_iters")
    return Provenance(
        config,
        _announced(head),
        _newest_checkpoint(folder / "checkpoints"),
        int(totals[-1]) if totals else planned if isinstance(planned, int) else None,
        lock_is_held(folder / ".lock"),
    )


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is no YAML ({reason[:200]}); put the run's configuration back") from error
    return flattened(tree) if isinstance(tree, dict) else {}


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of dicts as one dict with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _ends(path: Path) -> tuple[str, str]:
    if not path.is_file():
        return "", ""
    with open(path, "rb") as handle:
        head = handle.read(TAIL)
        handle.seek(max(0, path.stat().st_size - TAIL))
        return head.decode(errors="replace"), handle.read().decode(errors="replace")


def _announced(head: str) -> str:
    lines = []
    for line in head.splitlines():
        if line.startswith((" validation-", " [")):
            break
        lines.append(line)
    return "\n".join(lines)


def _newest_checkpoint(root: Path) -> dict[str, Any]:
    for folder in sorted(root.glob("iter_*"), reverse=True):
        try:
            state = json.loads((folder / "megacpt.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # being written, or removed, by the run that is read; an older one says nearly the same
        if isinstance(state, dict):
            return state
    return {}


def lock_is_held(path: Path) -> bool | None:
    """Whether a process holds a flock on `path`, by the kernel's table; None where there is none.

    Asking with flock itself could refuse a run its start at that moment.
    """
    try:
        table = Path("/proc/locks").read_text(encoding="utf-8")
        inode = path.stat().st_ino
    except FileNotFoundError:
        return False if Path("/proc/locks").exists() else None
    except OSError:
        return None
    return any(line.split()[5].rpartition(":")[2] == str(inode) for line in table.splitlines() if " FLOCK " in line)
