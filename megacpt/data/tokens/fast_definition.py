"""What gigatoken is given to build a tokenizer from: a tokenizer.json, made from the reference's definition.

Here is also decided which tokenizers it may encode for. For the rest there is `Unsuited`, and the reference encodes.
"""

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megacpt.data.tokens.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

SEPARATOR = "\U0010fffd"
"""A private character: where no piece of a vocabulary holds it, nothing merges across it."""
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
MODEL_TYPE, BPE, SPACE_AS_SUFFIX = 3, 2, 24
CHARACTER_MAP, DUMMY_PREFIX, REMOVE_SPACES, ESCAPE_SPACES = 2, 3, 4, 5
"""Numbers in sentencepiece_model.proto: types of pieces, then fields of trainer_spec, then those of normalizer_spec."""
SCORE = struct.Struct("<f")


class Unsuited(Exception):
    """This tokenizer cannot be run by gigatoken; the message says why."""


@dataclass(frozen=True)
class Definition:
    """A tokenizer.json for gigatoken.

    Attributes:
        content: where the vocabulary lacks a byte, one with an id beyond the vocabulary is made up for it.
        samples: texts in which this very vocabulary might be misread.
    """

    content: bytes
    samples: list[str] = field(default_factory=list)


def from_tokenizer_json(reference: HuggingFaceTokenizer) -> Definition:
    """The reference's own definition, in which no text can spell a special token.

    Raises:
        Unsuited: not a deterministic BPE on bytes.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    model, content = reference.outline["model"], reference.definition
    if model.get("type") != "BPE":
        raise Unsuited(f"its model is {model.get('type')}, not BPE")
    if model.get("dropout"):
        raise Unsuited("its merges are dropped at random")
    if not model.get("byte_fallback"):
        if "ByteLevel" not in _kinds(reference.outline.get("pre_tokenizer")):
            raise Unsuited("its BPE does not work on bytes")
        missing = [byte for byte in sorted(ByteLevel.alphabet()) if not reference.has_token(byte)]
        if missing:
            content = _with_tokens(content, {byte: reference.vocab_size + i for i, byte in enumerate(missing)})
    # Added tokens that are matched in any text: each amid letters, and amid white space.
    tokens = [token["content"] for token in reference.outline["added_tokens"] if not token["special"]]
    samples = [f"a{token}b {token} \n{token}" for token in tokens]
    return Definition(content, samples)


def _kinds(step: dict[str, Any] | None) -> list[str]:
    if step is None:
        return []
    return [step["type"], *(kind for inner in step.get("pretokenizers", []) for kind in _kinds(inner))]


def _with_tokens(content: bytes, tokens: dict[str, int]) -> bytes:
    import orjson

    spec = orjson.loads(content)
    spec["model"]["vocab"] |= tokens
    return orjson.dumps(spec)


def from_sentencepiece(reference: SentencePieceTokenizer) -> Definition:
    """A tokenizer.json that says what a SentencePiece model says.

    SentencePiece merges the pair that makes the best-scored piece, the leftmost of equals; tokenizer.json ranks pairs.
    The two may part only where equals overlap or follow each other, which `samples` therefore holds for every piece.

    Raises:
        Unsuited: not a BPE with byte fallback, or with a feature whose exactness is unproven.
    """
    import orjson

    pieces, trainer, normalizer = _read_model(reference.definition)
    scores = {piece: score for piece, score, kind in pieces if kind == NORMAL}
    if trainer.get(MODEL_TYPE) != BPE:
        raise Unsuited("its model is not BPE")
    if sum(kind == BYTE for *_, kind in pieces) != 256:
        raise Unsuited("its BPE has no bytes to fall back on")
    if any(kind not in (NORMAL, UNKNOWN, CONTROL, BYTE) for *_, kind in pieces):
        raise Unsuited("it has user-defined or unused pieces")
    unchanged = not normalizer.get(CHARACTER_MAP) and not normalizer.get(REMOVE_SPACES, 1)
    if not unchanged or not normalizer.get(ESCAPE_SPACES, 1) or trainer.get(SPACE_AS_SUFFIX):
        raise Unsuited("it changes the text before it is encoded")
    alphabet = set("".join(scores))
    if not alphabet <= scores.keys() or not alphabet.isdisjoint({SEPARATOR, "\ufdd0"}):
        raise Unsuited("some characters occur within its pieces alone")
    merges, samples = _merges(scores)
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    if normalizer.get(DUMMY_PREFIX, 1):
        steps.insert(0, {"type": "Prepend", "prepend": "▁"})
    # Control pieces and the unknown one cannot be spelled: no piece's alphabet has the non-character.
    spelled = [piece if kind in (NORMAL, BYTE) else f"\ufdd0{piece}" for piece, _, kind in pieces]
    model = {
        "type": "BPE",
        "unk_token": next((name for name in spelled if name.startswith("\ufdd0")), None),
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {name: i for i, name in enumerate(spelled)},
        "merges": merges,
    }
    spec = {"version": "1.0", "added_tokens": [], "normalizer": {"type": "Sequence", "normalizers": steps}}
    return Definition(orjson.dumps(spec | {"pre_tokenizer": None, "model": model}), samples)


def _merges(scores: dict[str, float]) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs in the order in which SentencePiece prefers them, and texts in which equals meet."""
    tied = Counter(score for piece, score in scores.items() if len(piece) > 1 and piece.strip("▁"))
    if tied and max(tied.values()) > 1:
        raise Unsuited("several of its pieces have the same score")
    ranked, meeting = [], []
    for piece, score in scores.items():
        lefts = [n for n in range(1, len(piece)) if piece[:n] in scores and piece[n:] in scores]
        ranked += [(-score, -n, piece[:n], piece[n:]) for n in lefts]
        if len(lefts) > 1:
            ends = {piece[:n]: piece[n:] for n in lefts}
            meeting += [piece + ends[piece[n:]] for n in lefts if piece[n:] in ends]
            meeting += [piece + piece for n in lefts if piece + piece[:n] in scores]
    ranked.sort()
    runs = [" " * n for n in range(1, 80)]
    return [(left, right) for *_, left, right in ranked], [SEPARATOR.join(meeting), "a".join(runs)]


def _read_model(model: bytes) -> tuple[list[tuple[str, float, int]], dict[int, Any], dict[int, Any]]:
    """(piece, score, type) by id, and the fields by number of trainer_spec and normalizer_spec."""
    pieces = []
    specs: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    for number, value in _fields(model):
        if number == 1:
            piece = dict(_fields(value))
            (score,) = SCORE.unpack(piece.get(2, bytes(4)))
            pieces.append((piece[1].decode("utf-8"), score, piece.get(3, NORMAL)))
        elif number in specs:
            specs[number] |= dict(_fields(value))
    return pieces, specs[2], specs[3]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a serialised protobuf message: an int, or bytes."""
    at, sizes = 0, {1: 8, 5: 4}
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size, at = (sizes[key & 7], at) if key & 7 in sizes else _varint(message, at)
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A variable-length integer and where it ends."""
    value = shift = 0
    while (byte := message[at]) > 127:
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
    return value | byte << shift, at + 1
