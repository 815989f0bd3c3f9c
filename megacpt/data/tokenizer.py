"""The two kinds of tokenizer that a corpus is encoded with, behind one small interface.

A document's text never yields a control or special id: a literal "</s>" or "<|endoftext|>" is spelled in ordinary
tokens. What a tokenizer's author declared as ordinary vocabulary that is matched in any text (added tokens that are
not special, SentencePiece's user-defined symbols) is matched here as well. The unknown id is the one exception: it
stands for a character that the vocabulary cannot spell.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megacpt.errors import UserError

TOKENIZER_TYPES = ("HuggingFaceTokenizer", "SentencePieceTokenizer")
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")
"""Names of the end-of-document token where a bare tokenizer.json does not say which it is."""
HIDDEN = "\ufdd0{}\ufdd0"
"""How a special token is spelled inside the encoder: between non-characters, which no text may hold."""
DECLARED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        type: one of TOKENIZER_TYPES.
        sha256: of the tokenizer file's content (decompressed), in hex.
        vocab_size: ids the model needs: the largest id + 1, added tokens included.
        eod_id: the end-of-document id (Megatron's `eod`), or None.
    """

    type: str
    sha256: str
    vocab_size: int
    eod_id: int | None

    def encode(self, text: str, add_special_tokens: bool = False) -> np.ndarray:
        """Ids int32 [tokens]; with `add_special_tokens`, framed (BOS, EOS) as the tokenizer frames a text."""
        ...

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[np.ndarray]:
        """`encode` of each text."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids, special tokens spelled out."""
        ...


def load_tokenizer(type_name: str, path: str | Path) -> Tokenizer:
    """Open a tokenizer: a tokenizer.json (or .json.gz, or the folder of one), or a SentencePiece .model.

    Raises:
        UserError: no such file, or not a tokenizer of this type.
    """
    path = Path(path)
    if type_name == "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(path)
    if type_name == "SentencePieceTokenizer":
        return SentencePieceTokenizer(path)
    raise UserError(f"tokenizer type {type_name!r} is unknown; choose one of {', '.join(TOKENIZER_TYPES)}")


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such tokenizer file; check --tokenizer-model") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: the tokenizer file cannot be read ({error})") from error


class SentencePieceTokenizer:
    """A SentencePiece model. Control symbols are not recognised in text; no BOS or EOS is ever added."""

    type = "SentencePieceTokenizer"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        content = _read(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocab_size = self._model.get_piece_size()
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{path}: not a SentencePiece model; check --tokenizer-model and its type") from error
        if self.vocab_size == 0:
            raise UserError(f"{path}: not a SentencePiece model; check --tokenizer-model and its type")
        self.sha256 = hashlib.sha256(content).hexdigest()
        eos = self._model.eos_id()
        self.eod_id = eos if eos >= 0 else None

    def encode(self, text: str, add_special_tokens: bool = False) -> np.ndarray:
        return np.asarray(self._model.encode(text, out_type=int), dtype=np.int32)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[np.ndarray]:
        return [np.asarray(ids, dtype=np.int32) for ids in self._model.encode(list(texts), out_type=int, num_threads=1)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode([int(i) for i in ids])


class HuggingFaceTokenizer:
    """A tokenizer.json, run by the `tokenizers` library alone.

    tokenizer_config.json and special_tokens_map.json beside it say which token ends a document and which tokens are
    special. A text is framed by the file's own post-processor; `add_bos_token` in the config changes nothing, as in
    transformers 5.
    """

    type = "HuggingFaceTokenizer"

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            names = ("tokenizer.json", "tokenizer.json.gz")
            path = next((path / name for name in names if (path / name).is_file()), path / names[0])
        self._content = _read(path)
        foreign = UserError(f"{path}: not a Hugging Face tokenizer.json; check --tokenizer-model and its type")
        try:
            spec = json.loads(self._content)
            specials = {token["content"] for token in spec["added_tokens"] if token["special"]}
        except (ValueError, KeyError, TypeError) as error:
            raise foreign from error
        settings = _settings_beside(path)
        specials |= set(_declared_tokens(settings))
        try:
            self._encoder = _tokenizer_from(json.dumps(_hide(spec, specials)).encode("utf-8"))
        except Exception as error:
            # The library raises bare Exception for whatever it cannot build.
            raise foreign from error
        self._decoder: Any = None
        self.sha256 = hashlib.sha256(self._content).hexdigest()
        ids = {_unhide(token): i for token, i in self._encoder.get_vocab(with_added_tokens=True).items()}
        self.vocab_size = max(ids.values(), default=-1) + 1
        self.eod_id = _end_of_document(path, settings, specials, ids)

    def encode(self, text: str, add_special_tokens: bool = False) -> np.ndarray:
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[np.ndarray]:
        encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        if self._decoder is None:
            self._decoder = _tokenizer_from(self._content)
        return self._decoder.decode([int(i) for i in ids], skip_special_tokens=False)


def _tokenizer_from(content: bytes) -> Any:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    # A corpus is encoded whole, whatever lengths the file was once used with.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _hide(spec: dict[str, Any], specials: set[str]) -> dict[str, Any]:
    """Respell the special tokens of a parsed tokenizer.json so that no text can spell them; ids stay.

    The library's `encode_special_tokens` alone does not do: it stops added tokens from being cut out of the text, but a
    Unigram or word-level model, or a BPE model with the right merges, still finds "</s>" in its own vocabulary.
    """
    model = dict(spec["model"])

    def hide(token: str) -> str:
        return HIDDEN.format(token) if token in specials else token

    if isinstance(model["vocab"], dict):
        model["vocab"] = {hide(token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[hide(token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = hide(model["unk_token"])
    if "merges" in model:
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not specials & {*pair, "".join(pair)}]
    added = [
        {**token, "content": hide(token["content"]), "special": token["content"] in specials}
        for token in spec["added_tokens"]
    ]
    return {**spec, "model": model, "added_tokens": added}


def _unhide(token: str) -> str:
    edge = HIDDEN[0]
    return token[1:-1] if token[:1] == edge == token[-1:] else token


def _settings_beside(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        beside = path.with_name(name)
        if not beside.is_file():
            continue
        try:
            found = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{beside}: not valid JSON ({error}); correct it or remove it") from error
        if not isinstance(found, dict):
            raise UserError(f"{beside}: not a JSON object; correct it or remove it")
        settings |= {key: value for key, value in found.items() if value is not None}
    return settings


def _declared_tokens(settings: dict[str, Any]) -> list[str]:
    tokens = [settings.get(name) for name in DECLARED]
    extra = settings.get("additional_special_tokens") or []
    return [token for token in map(_spelling, [*tokens, *extra]) if token]


def _spelling(token: Any) -> str | None:
    """A token as tokenizer_config.json writes it: a string, or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _end_of_document(path: Path, settings: dict[str, Any], specials: set[str], ids: dict[str, int]) -> int | None:
    declared = _spelling(settings.get("eos_token")) or _spelling(settings.get("sep_token"))
    if declared is not None:
        if declared not in ids:
            raise UserError(
                f"{path}: its end-of-sequence token {declared!r} is not in its vocabulary; correct its config"
            )
        return ids[declared]
    usual = [token for token in END_OF_DOCUMENT if token in specials and token in ids]
    return ids[usual[0]] if len(usual) == 1 else None
