"""A checkpoint or a Hugging Face folder as a live model on this process's groups, and the tokenizer that is its own."""

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from megacpt.config.architecture import Architecture
from megacpt.config.check import check_layout
from megacpt.config.tree import Config, Model
from megacpt.data.tokens.tokenizer import TOKENIZER_TYPES, load_tokenizer
from megacpt.errors import UserError
from megacpt.eval.codec import Codec, CorpusCodec, codec_in
from megacpt.model.build import BuildOptions, build_chunks, transformer_config
from megacpt.model.gpt import LanguageModel
from megacpt.model.hf.fill import fill_weights
from megacpt.model.hf.gguf import write_tokenizer
from megacpt.model.hf.source import gguf_file
from megacpt.train.checkpoint import BASE, load_weights, read_state
from megacpt.train.exchange import architecture_in, checkpoint_at
from megacpt.train.origin import Origin, open_hf

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a checkpoint, or an opened Hugging Face folder."""

    place: Path
    architecture: Architecture
    dtype: torch.dtype
    origin: Origin | None = None

    def build(self, model: Model) -> list[LanguageModel]:
        """This rank's chunks, weights loaded, on the process groups that are up.

        Raises:
            UserError: the layout does not divide the model, or the weights do not fit.
        """
        check_layout(model, self.architecture)
        options = BuildOptions(self.dtype, restart_positions=False)
        chunks = build_chunks(self.architecture, model, transformer_config(self.architecture, model, options), options)
        if self.origin is None:
            load_weights(self.place, chunks)
            return chunks
        assert self.origin.source is not None
        fill_weights(chunks, self.origin.source)
        self.origin.source.close()
        return chunks


def checkpoint_subject(place: Path, dtype: str | None) -> Subject:
    """A run, its checkpoints or one of them. `dtype` (bf16, fp32) None: as it was trained.

    Raises:
        UserError: no checkpoint there, or it does not say what shape the model has.
    """
    checkpoint = checkpoint_at(place)
    state = read_state(checkpoint)
    noted = state.identity["precision.dtype"] if state is not None else "float32"
    return Subject(checkpoint, architecture_in(checkpoint), DTYPES[dtype or noted])


def hf_subject(folder: Path, dtype: str | None) -> Subject:
    """A Hugging Face folder.

    Raises:
        UserError: what is wrong with it.
    """
    origin = open_hf(folder)
    assert origin.source is not None
    return Subject(folder, origin.architecture, DTYPES[dtype] if dtype else origin.source.dtype, origin)


def codec_of(subject: Subject, given: Path | None, scratch: Path) -> Codec:
    """The tokenizer named on the command line, else the subject's own.

    Args:
        scratch: a folder to unpack a GGUF file's tokenizer into.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if given is not None:
        return codec_at(given)
    if subject.origin is not None:
        gguf = gguf_file(subject.place)
        if gguf is not None:
            write_tokenizer(gguf, scratch)
        found = codec_in(subject.place if gguf is None else scratch)
    else:
        found = codec_in(subject.place / BASE) or _configured(subject.place / "run_config.yaml")
    if found is None:
        raise UserError(f"{subject.place}: no tokenizer there, and tasks are text; name one with --tokenizer")
    return found


def codec_at(place: Path) -> Codec:
    """A folder of a Hugging Face tokenizer, or a file: tokenizer.json or a SentencePiece model.

    Raises:
        UserError: it is none of these.
    """
    if place.is_dir():
        found = codec_in(place)
        if found is None:
            raise UserError(f"{place}: no tokenizer there (tokenizer.json, tokenizer.model)")
        return found
    hugging_face, sentencepiece = TOKENIZER_TYPES
    kind = sentencepiece if place.suffix == ".model" else hugging_face
    return CorpusCodec(load_tokenizer(kind, place))


def run_codec(config: Config, base: Path | None) -> Codec | None:
    """The tokenizer of a run: of the Hugging Face model that it began as (its files in `base`), or as configured."""
    found = codec_in(base) if base is not None else None
    if found is None and config.tokenizer is not None:
        return CorpusCodec(load_tokenizer(config.tokenizer.type, config.tokenizer.model))
    return found


def _configured(path: Path) -> Codec | None:
    """The tokenizer that the run's configuration names, where it does and the file is still there."""
    if not path.is_file():
        return None
    section = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("tokenizer")
    if not section or not Path(section["model"]).exists():
        return None
    return CorpusCodec(load_tokenizer(section["type"], section["model"]))
