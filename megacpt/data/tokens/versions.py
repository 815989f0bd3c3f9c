"""Versions of installed packages, without importlib.metadata: importing that takes longer than the answer is worth."""

import os
import sys

INFO = ".dist-info"


def installed_version(name: str) -> str | None:
    """Version of the package of this name, written as its folder of metadata is; None where it is not installed."""
    for folder in sys.path:
        try:
            entries = os.listdir(folder or ".")
        except OSError:
            continue
        found = [entry for entry in entries if entry.startswith(f"{name}-") and entry.endswith(INFO)]
        if len(found) == 1:
            return found[0].removeprefix(f"{name}-").removesuffix(INFO)
        if found:
            break
    return _looked_up(name)


def _looked_up(name: str) -> str | None:
    """What is installed in another way, or not cleanly."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None
