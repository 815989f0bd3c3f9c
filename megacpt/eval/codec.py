"""Text to ids and back as tasks need it: framed as the model's tokenizer frames a text, special ids known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megacpt.data.tokens.tokenizer import Tokenizer
from megacpt.errors import UserError


class Codec(Protocol):
    """`bos_id`, `eos_id`: of the tokens that begin and end a text, or None."""

    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str, add_special_tokens: bool | None) -> list[int]:
        """Ids of a text; None leaves the framing (BOS, EOS) to the tokenizer's own settings."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        ...


class TransformersCodec:
    """The tokenizer of a Hugging Face folder as transformers reads it, as lm_eval's `hf` model does.

    Raises:
        UserError: transformers is absent, or does not understand the files.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import transformers
        except ImportError as error:
            raise UserError(
                "tasks on a Hugging Face model are tokenised by transformers, which is not installed; "
                "pip install 'megacpt[eval]'"
            ) from error
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            # Whatever is wrong with such files, transformers says in exceptions of many kinds.
            raise UserError(
                f"{folder}: transformers cannot read the tokenizer ({str(error).splitlines()[0]}); restore its files"
            ) from error
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.eos_id: int | None = self._tokenizer.eos_token_id

    def encode(self, text: str, add_special_tokens: bool | None) -> list[int]:
        framing = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self._tokenizer.encode(text, **framing))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


class CorpusCodec:
    """The tokenizer that made a corpus: no framing, and documents begin after the end of another."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.bos_id: int | None = None
        self.eos_id = tokenizer.eod_id

    def encode(self, text: str, add_special_tokens: bool | None) -> list[int]:
        return [int(i) for i in self._tokenizer.encode(text)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        kept = [i for i in ids if not skip_special_tokens or i != self.eos_id]
        return self._tokenizer.decode(kept)


def codec_in(folder: Path) -> Codec | None:
    """The codec of a Hugging Face folder; None where it holds no tokenizer.

    Raises:
        UserError: see TransformersCodec.
    """
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return TransformersCodec(folder) if any((folder / name).is_file() for name in names) else None
