"""A KenLM model with the record of how it was made, and a document's perplexity under it.

`MODEL.json` lies beside MODEL. It holds the normalisation that the model's words went through, and a model without
it, or whose bytes are not those it names, is refused: under another normalisation a perplexity means nothing.

The perplexity of a document is CCNet's: 10 to the power of -(sum of log10 p over its sentences) / (words + sentences),
every sentence scored from <s> to </s>, so each </s> is one of the things predicted. Sentences are lines.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megacpt.data.scores.kenlm_build import import_kenlm
from megacpt.data.scores.normalize import Normalization, Sentences, normalization_from, normalizer
from megacpt.data.text.long_string import LongString
from megacpt.errors import UserError
from megacpt.files import json_beside, read_as, sha256_of, write_json

FORMAT = "megacpt kenlm model 1"
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")
"""How files of gzip, bzip2 and xz begin; KenLM reads those that it was built with the libraries for."""


@dataclass(frozen=True)
class ModelRecord:
    """How a model was made.

    Attributes:
        sha256: of the model file.
        file: "probing", "trie", "quantized_trie" or "arpa".
        ngrams: distinct n-grams of each order.
        trainer: which program, its version and its options.
        reference: files with hashes, documents, sentences, words, and the sha256 of the normalised text.
        overlap: evaluation sets that the reference was checked against (see overlap.EvalOverlap).
    """

    sha256: str
    file: str
    order: int
    ngrams: list[int]
    normalization: dict[str, Any]
    trainer: dict[str, Any]
    reference: dict[str, Any]
    overlap: list[dict[str, Any]] = field(default_factory=list)
    megacpt_version: str = ""
    format: str = FORMAT


def write_record(model: Path, record: ModelRecord) -> None:
    """Write `MODEL.json` atomically."""
    write_json(json_beside(model), asdict(record))


def read_record(model: Path) -> ModelRecord | None:
    """The record of a model, or None where there is none.

    Raises:
        UserError: it is there and is no such record.
    """
    path = json_beside(model)
    try:
        found = read_as(ModelRecord, path, FORMAT)
        normalization_from(found.normalization)
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not the record of a KenLM model ({error}); train the model again") from error


def check_model(model: Path, given: Normalization | None = None) -> tuple[Normalization, str, ModelRecord | None]:
    """The normalisation under which to use a model, the model's sha256, and its record.

    Args:
        given: the user's own word on it: needed without a record, and with one it must agree.

    Raises:
        UserError: no model, one without a record, one that is not the record's, or made with another normalisation.
    """
    if not model.is_file():
        raise UserError(f"{model}: no such model; train one with tools/train_kenlm.py")
    record, sha256 = read_record(model), sha256_of(model)
    if record is None:
        if given is None:
            raise UserError(
                f"{model}: without {json_beside(model).name} nothing says how its text was normalised; "
                "say it with --normalization (for instance ccnet, or lowercase,digits_to_zero,punctuation=keep)"
            )
        return given, sha256, None
    if record.sha256 != sha256:
        raise UserError(f"{model}: not the model that {json_beside(model).name} describes; train it again")
    made = normalization_from(record.normalization)
    if given is not None and given != made:
        raise UserError(
            f"{model}: was trained on text normalised with {made.spelled()}, not {given.spelled()}; "
            "drop --normalization"
        )
    return made, sha256, record


class PerplexityScorer:
    """Perplexities of documents; the lower, the more a text is like the reference.

    Raises:
        UserError: KenLM cannot load the model.
    """

    def __init__(self, model: Path, normalization: Normalization) -> None:
        kenlm = import_kenlm()
        config = kenlm.Config()
        config.show_progress = False
        config.arpa_complain = kenlm.ARPALoadComplain.NONE
        try:
            self._model = kenlm.Model(str(model), config)
        except (OSError, RuntimeError) as error:
            with open(model, "rb") as handle:
                packed = handle.read(max(map(len, PACKED))).startswith(PACKED)
            what = "model as it is packed; unpack it" if packed else "model; train it again"
            raise UserError(f"{model}: KenLM cannot load this {what}") from error
        self._normalize = normalizer(normalization)

    def score(self, texts: Sequence[str | LongString]) -> np.ndarray:
        """float32 [texts]; infinite for a text without a word."""
        return np.array(list(map(self._perplexity, self._normalize(texts))), np.float32)

    def _perplexity(self, document: Sentences) -> float:
        """Of the words of a document and the ends of its sentences."""
        count = document.words + len(document.lines)
        return 10.0 ** (-sum(map(self._model.score, document.lines)) / count) if count else float("inf")
