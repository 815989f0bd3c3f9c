"""`PREFIX.json`, beside `PREFIX.{bin,idx}`: what a token dataset was made from."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megacpt.data.text.provenance import Filters, InputFile
from megacpt.data.tokens.indexed import bin_path, idx_path
from megacpt.data.tokens.lengths import LengthStatistics
from megacpt.errors import UserError
from megacpt.files import json_beside, write_json

FORMAT = "megacpt token dataset 1"


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer made the tokens; two datasets agree when these are equal."""

    type: str
    sha256: str
    vocab_size: int
    eod_id: int | None


@dataclass(frozen=True)
class ShardInfo:
    """Which part of a corpus a dataset of one of several jobs holds.

    Attributes:
        job: a digest of what the jobs must agree on: inputs, options, tokenizer.
        first_input: number of the file, among all inputs, that `inputs` begins with.
        start, stop: [file, offset] of the first row and of the one after the last; None where the part is no file's.
    """

    index: int
    count: int
    job: str
    first_input: int
    start: list[int] | None
    stop: list[int] | None


@dataclass(frozen=True)
class Manifest:
    """What a token dataset holds.

    Attributes:
        json_keys: all keys that the rows were read for; `json_key` is this dataset's.
        documents: documents in the index, empty ones included.
        tokens: all tokens, EOD included.
        eod_tokens: documents that end with an EOD of ours.
        text_bytes: UTF-8 bytes of the text of all documents; None where nobody counted them.
        skipped: rows passed over under --skip-invalid, by kind.
        too_short, duplicates: rows dropped by `filters`.
        filters: None if no one run over the inputs would give these documents (a merge of differing datasets).
        lengths: None where an earlier version wrote the manifest.
        dtype: of the tokens: uint16 or int32.
        tokenizer_model: where the tokenizer lay then, an absolute path; empty where nobody said.
        engine: what encoded the text.
        versions: of Python and of the libraries.
    """

    megacpt_version: str
    inputs: list[InputFile]
    tokenizer: TokenizerInfo
    append_eod: bool
    dtype: str
    json_key: str = ""
    json_keys: list[str] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0
    eod_tokens: int = 0
    text_bytes: int | None = None
    empty_documents: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    too_short: int = 0
    duplicates: int = 0
    filters: Filters | None = field(default_factory=Filters)
    lengths: LengthStatistics | None = None
    tokenizer_model: str = ""
    engine: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    shard: ShardInfo | None = None
    format: str = FORMAT


def manifest_path(prefix: str | Path) -> Path:
    """`PREFIX.json`; a prefix may itself contain dots."""
    return json_beside(prefix)


def dataset_files(prefix: str | Path) -> list[Path]:
    """`PREFIX.bin`, `PREFIX.idx` and `PREFIX.json`."""
    return [path(prefix) for path in (bin_path, idx_path, manifest_path)]


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

    def within(self, name: str) -> "_Fields | None":
        """The object under a name, or None if the name is null."""
        if name in self.values and self.values[name] is None:
            return None
        return _Fields(self.path, self.get(name, dict), f"{self.where}{name}.")

    def text_in(self, name: str, key: str) -> str:
        return _Fields(self.path, self.get(name, dict), f"{self.where}{name}.").get(key, str)

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
        **_added_later(fields),
    )


def _added_later(fields: _Fields) -> dict[str, Any]:
    """Fields that manifests of version 0.1.0 do not have."""
    if "filters" not in fields.values:
        appended = fields.count("documents") - fields.count("empty_documents") if fields.get("append_eod", bool) else 0
        keys = [fields.get("json_key", str)]
        return {"json_keys": keys, "eod_tokens": appended, "filters": Filters(bool(fields.counts("skipped")))}
    filters, lengths, shard = (fields.within(name) for name in ("filters", "lengths", "shard"))
    return {
        "json_keys": fields.get("json_keys", list),
        "eod_tokens": fields.count("eod_tokens"),
        "text_bytes": None if fields.values.get("text_bytes") is None else fields.count("text_bytes"),
        "too_short": fields.count("too_short"),
        "duplicates": fields.count("duplicates"),
        "filters": filters
        and Filters(filters.get("skip_invalid", bool), filters.count("min_chars"), filters.get("dedup", str)),
        "lengths": lengths and _lengths(lengths),
        "tokenizer_model": fields.get("tokenizer_model", str) if "tokenizer_model" in fields.values else "",
        "engine": fields.get("engine", str),
        "versions": {name: fields.text_in("versions", name) for name in fields.get("versions", dict)},
        "shard": shard and _shard(shard),
    }


def _lengths(fields: _Fields) -> LengthStatistics:
    return LengthStatistics(
        min=fields.count("min"),
        mean=fields.get("mean", float),
        median=fields.count("median"),
        p90=fields.count("p90"),
        p99=fields.count("p99"),
        max=fields.count("max"),
        histogram=fields.counts("histogram"),
    )


def _shard(fields: _Fields) -> ShardInfo:
    return ShardInfo(
        index=fields.count("index"),
        count=fields.count("count"),
        job=fields.get("job", str),
        first_input=fields.count("first_input"),
        start=None if fields.values.get("start") is None else fields.get("start", list),
        stop=None if fields.values.get("stop") is None else fields.get("stop", list),
    )
