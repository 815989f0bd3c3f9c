"""The Hugging Face model that a run's weights began as: its shape, its tokenizer and small files, which travel along.

Every checkpoint keeps those files in a folder of its own, so that an export needs nothing but the checkpoint.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from megacpt.config.architecture import Architecture, Base
from megacpt.data.tokens.tokenizer import Tokenizer, load_tokenizer
from megacpt.errors import UserError
from megacpt.files import write_json
from megacpt.model.hf.companions import copy_companions
from megacpt.model.hf.config_json import architecture_from, config_for
from megacpt.model.hf.families import family_of
from megacpt.model.hf.gguf import write_tokenizer
from megacpt.model.hf.source import Source, gguf_file, read_config
from megacpt.train.checkpoint import BASE

PROVENANCE = "base.json"
TOKENIZERS = {"HuggingFaceTokenizer": "tokenizer.json", "SentencePieceTokenizer": "tokenizer.model"}


@dataclass(frozen=True)
class Origin:
    """Where the small files lie: a Hugging Face folder (then with its opened weights), or `hf/` in a checkpoint."""

    folder: Path
    architecture: Architecture
    source: Source | None = None

    @property
    def base(self) -> Base:
        """The shape that the weights bring to a run."""
        return Base(self.architecture, str(self.folder / "config.json"))

    def check_tokenizer(self) -> None:
        """Refuse a tokenizer that the embedding has no rows for.

        Raises:
            UserError: names the file and both sizes.
        """
        tokenizer = find_tokenizer(self.folder)
        if tokenizer is not None and tokenizer.vocab_size > self.architecture.vocab_size:
            raise UserError(
                f"{self.folder / TOKENIZERS[tokenizer.type]}: the tokenizer has {tokenizer.vocab_size:,} tokens, the "
                f"embedding {self.architecture.vocab_size:,} rows; restore the model's own tokenizer"
            )

    def write(self, target: Path, architecture: Architecture) -> None:
        """Write the small files into `target`, config.json with the shape that the run really has."""
        config = self.source.config if self.source is not None else read_config(self.folder)
        gguf = gguf_file(self.folder)
        if gguf is not None:
            write_tokenizer(gguf, target)
        else:
            copy_companions(self.folder, target, skip=("config.json",))
        write_json(target / "config.json", config_for(architecture, config, family_of(config, str(self.folder))))
        known = self.folder / PROVENANCE
        name = self.folder.resolve().name if gguf is None else gguf.name
        write_json(target / PROVENANCE, json.loads(known.read_text()) if known.is_file() else {"base": name})


def open_hf(folder: str | Path) -> Origin:
    """A Hugging Face folder, every tensor of it described and checked.

    Raises:
        UserError: one sentence that names the tensor or field and the file.
    """
    source = Source(folder)
    origin = Origin(Path(folder), source.architecture, source)
    origin.check_tokenizer()
    return origin


def origin_of(checkpoint: Path) -> Origin | None:
    """What a checkpoint says about the model that it began from; None where it began from fresh weights."""
    folder = checkpoint / BASE
    if not (folder / "config.json").is_file():
        return None
    return Origin(folder, architecture_from(read_config(folder), str(folder / "config.json")))


def find_tokenizer(folder: Path, kind: str | None = None) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, of one type or of any; None where it has none."""
    for type_name, file in TOKENIZERS.items():
        if kind in (None, type_name) and (folder / file).is_file():
            return load_tokenizer(type_name, folder / file)
    return None


def provenance(folder: Path | None) -> str | None:
    """The name of the model that weights began as."""
    path = folder / PROVENANCE if folder is not None else None
    return json.loads(path.read_text(encoding="utf-8"))["base"] if path is not None and path.is_file() else None
