"""README.md against the disk: its tree, its make targets, the tools, modules and files that it names.

The tree is the first fenced block below a heading that contains "tree". One entry a line, two spaces of indent for each
level, folders end in "/"; several names on a line are separated by commas; what follows two spaces is description.
Every tracked file and folder at the top and below megacpt/, kernels/ and tools/ must be there (`__init__.py` need not).
"""

import re
import shutil
import subprocess
from pathlib import Path, PurePosixPath

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LISTED_IN_FULL = ("megacpt", "kernels", "tools")
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def tree_block(readme: str) -> str:
    heading = re.search(r"^#+ .*\btree\b.*$", readme, re.MULTILINE | re.IGNORECASE)
    block = FENCE.search(readme, heading.end()) if heading else None
    assert block, "README.md needs a heading with the word tree and a fenced block below it"
    return block[1]


def tree_entries(block: str) -> list[str]:
    """The paths that a tree block lists, folders with a closing slash."""
    entries: list[str] = []
    above: list[str] = []
    for line in filter(str.strip, block.splitlines()):
        depth, odd = divmod(len(line) - len(line.lstrip(" ")), 2)
        assert not odd, f"odd indent: {line!r}"
        assert depth <= len(above), f"indented below no folder: {line!r}"
        names = re.split(r",\s*", re.split(r" {2,}", line.strip())[0])
        del above[depth:]
        entries += ["".join(above) + name for name in names]
        if len(names) == 1 and names[0].endswith("/"):
            above.append(names[0])
    return entries


def expected_entries(tracked: list[str]) -> set[str]:
    """What the tree has to list, given the tracked files."""
    expected = set()
    for path in map(PurePosixPath, tracked):
        expected.add(path.parts[0] + ("/" if len(path.parts) > 1 else ""))
        if path.parts[0] in LISTED_IN_FULL:
            expected.update(f"{folder}/" for folder in path.parents if folder.name)
            if path.name != "__init__.py":
                expected.add(str(path))
    return expected


def code_of(readme: str) -> str:
    """Fenced blocks and inline code, the only places where "make x" is a command."""
    prose = FENCE.sub("", readme)
    return "\n".join([*FENCE.findall(readme), *re.findall(r"`([^`\n]+)`", prose)])


@pytest.fixture(scope="module")
def readme() -> str:
    return (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_every_path_of_the_tree_exists(readme: str) -> None:
    wrong = []
    for entry in tree_entries(tree_block(readme)):
        path = REPOSITORY / entry
        if not (path.is_dir() if entry.endswith("/") else path.is_file()):
            wrong.append(entry)
    assert wrong == []


def test_the_tree_lists_everything_once(readme: str) -> None:
    if not (shutil.which("git") and (REPOSITORY / ".git").exists()):
        pytest.skip("needs git and a checkout to know which files are tracked")
    command = ["git", "-C", str(REPOSITORY), "ls-files", "-z"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    tracked = [name for name in output.split("\0") if name and (REPOSITORY / name).exists()]
    entries = tree_entries(tree_block(readme))
    missing = sorted(expected_entries(tracked) - set(entries))
    assert not missing, "the tree in README.md lacks: " + ", ".join(missing)
    assert len(entries) == len(set(entries))


def test_every_make_target_exists(readme: str) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", code_of(readme)))
    assert named - targets == set()
    assert {"quickstart", "test"} <= named


def test_tools_examples_and_links_exist(readme: str) -> None:
    named = set(re.findall(r"(?<![\w/])(?:tools|examples|docs|tests)/[\w./-]*\w", readme))
    named |= {link for link in re.findall(r"(?:\]\(|src(?:set)?=\")([^)#\"\s]+)", readme) if "://" not in link}
    assert sorted(name for name in named if not (REPOSITORY / name).exists()) == []


def test_modules_run_by_name_exist(readme: str) -> None:
    for module in re.findall(r"-m (megacpt[\w.]*)", readme):
        path = REPOSITORY.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_a_tree_is_read_by_indent() -> None:
    block = "a/   first\n  b.py, c.py  two files\n  d/\n    e.py\nf.txt\n"
    assert tree_entries(block) == ["a/", "a/b.py", "a/c.py", "a/d/", "a/d/e.py", "f.txt"]


def test_what_a_tree_must_list() -> None:
    tracked = ["README.md", "megacpt/__init__.py", "megacpt/data/a.py", "tests/data/test_x.py"]
    assert expected_entries(tracked) == {
        "README.md",
        "megacpt/",
        "megacpt/data/",
        "megacpt/data/a.py",
        "tests/",
    }
