"""Runs as they are named on a command line: FOLDER, NAME=FOLDER, and groups NAME=RUN,RUN."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megacpt.errors import UserError
from megacpt.report.reading import read_run
from megacpt.report.run import RunData


def read_named(runs: Sequence[str], groups: Sequence[str]) -> tuple[list[RunData], dict[str, list[RunData]]]:
    """All runs, each read once, under names of their own; and the members of each group.

    Args:
        runs: "FOLDER" or "NAME=FOLDER".
        groups: "NAME=RUN,RUN,...", a RUN being a folder or the NAME of one of `runs`.

    Raises:
        UserError: nothing is named, a name is given twice, a group has no members, or a run cannot be read.
    """
    given: dict[str, Path] = {}
    unnamed: list[Path] = []
    for text in runs:
        name, folder = _name_and_folder(text)
        if not name:
            unnamed.append(folder)
        elif name in given:
            raise UserError(f"{text}: another run is called {name} already; give each its own name")
        else:
            given[name] = folder
    members = _members(groups, given)
    called = {_real(folder): name for name, folder in given.items()}
    unnamed += [folder for group in members.values() for folder in group]
    fresh = {_real(folder): folder for folder in unnamed if _real(folder) not in called}
    called |= dict(zip(fresh, short_names(list(fresh)), strict=True))
    places = {_real(folder): folder for folder in [*given.values(), *fresh.values()]}
    if not places:
        raise UserError("no run is named; give at least one run's folder")
    read = {real: read_run(folder, called[real]) for real, folder in places.items()}
    return list(read.values()), {
        name: [read[real] for real in dict.fromkeys(map(_real, group))] for name, group in members.items()
    }


def _members(groups: Sequence[str], given: Mapping[str, Path]) -> dict[str, list[Path]]:
    members: dict[str, list[Path]] = {}
    for text in groups:
        name, equals, rest = text.partition("=")
        folders = [given.get(part, Path(part)) for part in filter(None, rest.split(","))]
        if not (name and equals and folders):
            raise UserError(f"--group {text}: write NAME=RUN,RUN,... with at least one run")
        if name in members:
            raise UserError(f"--group {text}: there is a group {name} already; give each its own name")
        members[name] = folders
    return members


def _name_and_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if equals and name and "/" not in name and not Path(text).exists():
        return name, Path(folder)
    return "", Path(text)


def _real(folder: Path) -> Path:
    return folder.resolve()


def short_names(folders: Sequence[Path]) -> list[str]:
    """The fewest last parts of each path that tell it from the others."""
    names = []
    for folder in folders:
        others = [other.parts for other in folders if other != folder]
        count = 1
        while count < len(folder.parts) and any(other[-count:] == folder.parts[-count:] for other in others):
            count += 1
        names.append("/".join(part for part in folder.parts[-count:] if part != "/"))
    return names
