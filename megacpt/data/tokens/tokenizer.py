"""The two kinds of tokenizer that a corpus is encoded with, behind one small interface: the reference.

What these say is what a dataset holds; `fast_tokenizer` says the same, many times faster.

A document's text never yields a control or special id: a literal "</s>" or "<|endoftext|>" is spelled in ordinary
tokens. What a tokenizer's author declared as ordinary vocabulary that is matched in any text (added tokens that are
not special, SentencePiece's user-defined symbols) is matched here as well. The unknown id is the one exception: it
stands for a character that the vocabulary cannot spell.
"""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from megacpt.errors import UserError

TOKENIZER_TYPES = ("HuggingFaceTokenizer", "SentencePieceTokenizer")
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")
"""Names of the end-of-document token where a bare tokenizer.json does not say which it is."""
HIDDEN = "\ufdd0{key}:{token}\ufdd0"
"""How a special token is spelled inside the encoder: between non-characters, under a key that no text holds."""
PARTS = ("vocab", "merges")
"""What is large in a tokenizer.json's model."""
DECLARED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Encoded(NamedTuple):
    """Texts encoded, end to end: ids int32 [tokens]; of each text its tokens, int32 [texts], and its UTF-8 bytes, int64
    [texts]."""

    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        type: one of TOKENIZER_TYPES.
        sha256: of the tokenizer file's content (decompressed), in hex.
        vocab_size: ids the model needs: the largest id + 1, added tokens included.
        eod_id: the end-of-document id (Megatron's `eod`), or None.
        engine: name and version of the library that encodes.
    """

    type: str
    sha256: str
    vocab_size: int
    eod_id: int | None
    engine: str

    def encode(self, text: str, add_special_tokens: bool = False) -> np.ndarray:
        """Ids int32 [tokens]; with `add_special_tokens`, framed (BOS, EOS) as the tokenizer frames a text."""
        ...

    def encode_flat(self, texts: Sequence[str], add_special_tokens: bool = False) -> Encoded:
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


def flatten(texts: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of several texts end to end: ids int32 [tokens] and lengths int32 [texts]."""
    lengths = np.fromiter(map(len, texts), dtype=np.int32, count=len(texts))
    ids = [np.asarray(text, dtype=np.int32) for text in texts]
    return np.concatenate(ids) if ids else np.empty(0, dtype=np.int32), lengths


def sizes_of(texts: Sequence[str | bytes]) -> np.ndarray:
    """UTF-8 bytes of each text, int64 [texts]; of ASCII and of what is UTF-8 already nothing is encoded."""
    sizes = (len(text if isinstance(text, bytes) or text.isascii() else text.encode("utf-8")) for text in texts)
    return np.fromiter(sizes, dtype=np.int64, count=len(texts))


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such tokenizer file; check --tokenizer-model") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: the tokenizer file cannot be read ({error})") from error


class SentencePieceTokenizer:
    """A SentencePiece model. Control symbols are not recognised in text; no BOS or EOS is ever added.

    Attributes:
        definition: the model as it lies in the file.
        special_tokens: pieces that text does not yield, sorted.
    """

    type = "SentencePieceTokenizer"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        content = _read(path)
        foreign = UserError(f"{path}: not a SentencePiece model; check --tokenizer-model and its type")
        # Of an empty model the library complains on stderr.
        if not content:
            raise foreign
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocab_size = self._model.get_piece_size()
        except (RuntimeError, ValueError, OSError) as error:
            raise foreign from error
        if self.vocab_size == 0:
            raise foreign
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.definition = content
        self.engine = f"sentencepiece {sentencepiece.__version__}"
        ids = list(range(self.vocab_size))
        reserved = np.flatnonzero(np.logical_or(self._model.is_control(ids), self._model.is_unknown(ids)))
        self.special_tokens = sorted(self._model.id_to_piece(reserved.tolist()))
        eos = self._model.eos_id()
        self.eod_id = eos if eos >= 0 else None

    def encode(self, text: str, add_special_tokens: bool = False) -> np.ndarray:
        return np.asarray(self._model.encode(text, out_type=int), dtype=np.int32)

    def encode_flat(self, texts: Sequence[str], add_special_tokens: bool = False) -> Encoded:
        return Encoded(*flatten(self._model.encode(list(texts), out_type=int, num_threads=1)), sizes_of(texts))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode([int(i) for i in ids])


class HuggingFaceTokenizer:
    """A tokenizer.json, run by the `tokenizers` library alone.

    tokenizer_config.json and special_tokens_map.json beside it say which token ends a document and which tokens are
    special. A text is framed by the file's own post-processor; `add_bos_token` in the config changes nothing, as in
    transformers 5.

    Attributes:
        outline: the tokenizer.json that encodes (the file's, its special tokens respelled), parsed, without the model's
            vocabulary and merges.
        parts: these two, as far as it has them, in JSON by name; merges are "left right" where they can be.
        special_tokens: tokens that text does not yield, sorted.
    """

    type = "HuggingFaceTokenizer"

    def __init__(self, path: Path) -> None:
        if os.path.isdir(path):  # no error where the system has one, which reading it will meet
            names = ("tokenizer.json", "tokenizer.json.gz")
            path = next((path / name for name in names if (path / name).is_file()), path / names[0])
        import orjson

        self._content = _read(path)
        self.sha256 = hashlib.sha256(self._content).hexdigest()
        foreign = UserError(f"{path}: not a Hugging Face tokenizer.json; check --tokenizer-model and its type")
        try:
            spec = orjson.loads(self._content)
            specials = {token["content"] for token in spec["added_tokens"] if token["special"]}
        except (ValueError, KeyError, TypeError) as error:
            raise foreign from error
        settings = _settings_beside(path)
        specials |= set(_declared_tokens(settings))
        try:
            hidden = {token: HIDDEN.format(key=self.sha256[:16], token=token) for token in specials}
            spec = _respell(spec, hidden)
            self.outline = _outline(spec)
            self.parts = {name: orjson.dumps(spec["model"][name]) for name in PARTS if name in spec["model"]}
            largest = _largest_id(spec)
            # What was parsed is freed before the library takes as much memory again.
            del spec
            self._encoder = _tokenizer_from(definition_of(self.outline, self.parts))
            added = {token["content"] for token in self.outline["added_tokens"]}
            self.vocab_size = 1 + max(largest, *map(self._encoder.token_to_id, added), -1)
        except Exception as error:
            # The library raises bare Exception for whatever it cannot build.
            raise foreign from error
        self._decoder: Any = None
        self.engine = _library()
        self.special_tokens = sorted(specials)
        ids = {token: self._encoder.token_to_id(hidden[token]) for token in self.special_tokens}
        self.eod_id = _end_of_document(path, settings, {token: i for token, i in ids.items() if i is not None})

    def encode(self, text: str, add_special_tokens: bool = False) -> np.ndarray:
        return self.encode_flat([text], add_special_tokens)[0]

    def encode_flat(self, texts: Sequence[str], add_special_tokens: bool = False) -> Encoded:
        encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return Encoded(*flatten([encoding.ids for encoding in encodings]), sizes_of(texts))

    def has_token(self, token: str) -> bool:
        """Whether the vocabulary, as `parts` spells it, has this token."""
        return self._encoder.token_to_id(token) is not None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        if self._decoder is None:
            self._decoder = _tokenizer_from(self._content)
        return self._decoder.decode([int(i) for i in ids], skip_special_tokens=False)


def definition_of(outline: dict[str, Any], parts: dict[str, bytes]) -> bytes:
    """A tokenizer.json from its two halves, as `HuggingFaceTokenizer` has them."""
    import orjson

    model = outline["model"] | {name: orjson.Fragment(part) for name, part in parts.items()}
    return orjson.dumps(outline | {"model": model})


def _library() -> str:
    import tokenizers

    return f"tokenizers {tokenizers.__version__}"


def _tokenizer_from(content: bytes) -> Any:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    # A corpus is encoded whole, whatever lengths the file was once used with.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _respell(spec: dict[str, Any], hidden: dict[str, str]) -> dict[str, Any]:
    """A parsed tokenizer.json in which the special tokens have their hidden spelling, so that no text can spell them.

    The library's `encode_special_tokens` alone does not do: it stops added tokens from being cut out of the text, but a
    Unigram or word-level model, or a BPE model with the right merges, still finds "</s>" in its own vocabulary.
    """
    model = dict(spec["model"])
    vocab = model["vocab"]
    if not isinstance(vocab, dict):
        model["vocab"] = [[hidden.get(token, token), score] for token, score in vocab]
    elif not vocab.keys().isdisjoint(hidden):
        model["vocab"] = {hidden.get(token, token): i for token, i in vocab.items()}
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges", [])]
        kept = [
            (left, right)
            for left, right in pairs
            if left + right not in hidden and left not in hidden and right not in hidden
        ]
        model |= {"merges": kept} if "merges" in model else {}
    if model.get("unk_token") is not None:
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    added = [
        {**token, "content": hidden.get(token["content"], token["content"]), "special": token["content"] in hidden}
        for token in spec["added_tokens"]
    ]
    return {**spec, "model": _compact(model), "added_tokens": added}


def _compact(model: dict[str, Any]) -> dict[str, Any]:
    """A model whose merges are written "left right", if they can be: the library reads them a fifth faster."""
    merges = model.get("merges")
    if not merges or not isinstance(merges[0], list | tuple) or any(" " in token for token in model["vocab"]):
        return model
    return {**model, "merges": [f"{left} {right}" for left, right in merges]}


def _largest_id(spec: dict[str, Any]) -> int:
    vocab = spec["model"]["vocab"]
    return max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1


def _outline(spec: dict[str, Any]) -> dict[str, Any]:
    return {**spec, "model": {name: value for name, value in spec["model"].items() if name not in PARTS}}


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


def _end_of_document(path: Path, settings: dict[str, Any], ids: dict[str, int]) -> int | None:
    """The end-of-document id, from the ids of the special tokens in the vocabulary."""
    declared = _spelling(settings.get("eos_token")) or _spelling(settings.get("sep_token"))
    if declared is not None:
        if declared not in ids:
            raise UserError(
                f"{path}: its end-of-sequence token {declared!r} is not in its vocabulary; correct its config"
            )
        return ids[declared]
    usual = [token for token in END_OF_DOCUMENT if token in ids]
    return ids[usual[0]] if len(usual) == 1 else None
