"""`PREFIX.json`, beside `PREFIX.{bin,idx}`: what a token dataset was made from."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megacpt.errors import UserError
from megacpt.files import write_json

FORMAT = "megacpt token dataset 1"


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer made the tokens; two datasets agree when these are equal."""

    type: str
    sha256: str
    vocab_size: int
    eod_id: int | None


@dataclass(frozen=True)
class InputFile:
    """One input file: its name without folders, size, and sha256 of its bytes as they lie on disk."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a token dataset holds.

    Attributes:
        documents: documents in the index, empty ones included.
        tokens: all tokens, EOD included.
        skipped: rows passed over under --skip-invalid, by kind.
        dtype: of the tokens: uint16 or int32.
    """

    megacpt_version: str
    inputs: list[InputFile]
    tokenizer: TokenizerInfo
    append_eod: bool
    dtype: str
    json_key: str = ""
    documents: int = 0
    tokens: int = 0
    empty_documents: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    format: str = FORMAT


def manifest_path(prefix: str | Path) -> Path:
    """`PREFIX.json`; a prefix may itself contain dots."""
    return Path(f"{prefix}.json")


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Write `PREFIX.json` atomically."""
    write_json(manifest_path(prefix), asdict(manifest))


def read_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest of a dataset, or None where it has none (a dataset that another tool wrote).

    Whether it agrees with the index is for the caller to check.

    Raises:
        UserError: the file is there but is not a manifest, or a field is missing or of the wrong type.
    """
    path = manifest_path(prefix)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: the dataset's manifest cannot be read ({error}); preprocess the corpus again"
        ) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path}: not a dataset manifest of this version ({FORMAT!r}); preprocess the corpus again")
    return _manifest(_Fields(path, found))


class _Fields:
    """A JSON object read field by field, each checked for its type."""

    def __init__(self, path: Path, values: Any, where: str = "") -> None:
        self.path, self.where = path, where
        if not isinstance(values, dict):
            raise self.wrong(where.rstrip("."))
        self.values: Mapping[str, Any] = values

    def wrong(self, name: str) -> UserError:
        return UserError(f"{self.path}: {name!r} is missing or of the wrong type; preprocess the corpus again")

    def get[T](self, name: str, kind: type[T]) -> T:
        value = self.values.get(name)
        if not isinstance(value, kind):
            raise self.wrong(self.where + name)
        return value

    def count(self, name: str) -> int:
        value = self.get(name, int)
        # bool is a subclass of int, and a count of True is as wrong as one of "3".
        if isinstance(value, bool) or value < 0:
            raise self.wrong(self.where + name)
        return value

    def counts(self, name: str) -> dict[str, int]:
        inner = _Fields(self.path, self.get(name, dict), f"{self.where}{name}.")
        return {key: inner.count(key) for key in inner.values}


def _manifest(fields: _Fields) -> Manifest:
    files = [_Fields(fields.path, item, f"inputs[{i}].") for i, item in enumerate(fields.get("inputs", list))]
    tokenizer = _Fields(fields.path, fields.get("tokenizer", dict), "tokenizer.")
    has_eod = tokenizer.values.get("eod_id") is not None
    return Manifest(
        megacpt_version=fields.get("megacpt_version", str),
        inputs=[InputFile(f.get("name", str), f.count("bytes"), f.get("sha256", str)) for f in files],
        json_key=fields.get("json_key", str),
        tokenizer=TokenizerInfo(
            type=tokenizer.get("type", str),
            sha256=tokenizer.get("sha256", str),
            vocab_size=tokenizer.count("vocab_size"),
            eod_id=tokenizer.count("eod_id") if has_eod else None,
        ),
        append_eod=fields.get("append_eod", bool),
        documents=fields.count("documents"),
        tokens=fields.count("tokens"),
        empty_documents=fields.count("empty_documents"),
        dtype=fields.get("dtype", str),
        skipped=fields.counts("skipped"),
    )
