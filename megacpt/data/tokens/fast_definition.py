"""What gigatoken is given to build a tokenizer from: a tokenizer.json, made from the reference's definition.

Here is also decided which tokenizers it may encode for. For the rest there is `Unsuited`, and the reference encodes.
"""

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megacpt.data.tokens.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, definition_of

SEPARATOR = "\U0010fffd"
"""A private character: where no piece of a vocabulary holds it, nothing merges across it."""
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
MODEL_TYPE, BPE, SPACE_AS_SUFFIX = 3, 2, 24
CHARACTER_MAP, DUMMY_PREFIX, REMOVE_SPACES, ESCAPE_SPACES = 2, 3, 4, 5
"""Numbers in sentencepiece_model.proto: types of pieces, then fields of trainer_spec, then those of normalizer_spec."""
TEXT_KEY, SCORE_KEY, TYPE_KEY = 0x0A, b"\x15", 0x18
"""What fields 1 (bytes), 2 (a float) and 3 (an integer) begin with."""
SCORE = struct.Struct("<f")


class Unsuited(Exception):
    """This tokenizer cannot be run by gigatoken; the message says why."""


@dataclass(frozen=True)
class Definition:
    """A tokenizer.json for gigatoken.

    Attributes:
        content: where the vocabulary lacks a byte, one with an id beyond the vocabulary is made up for it.
        samples: texts in which this very vocabulary might be misread.
        composed: whether text has to be in NFC to be read right.
    """

    content: bytes
    samples: list[str] = field(default_factory=list)
    composed: bool = False


def from_tokenizer_json(reference: HuggingFaceTokenizer) -> Definition:
    """The reference's own definition without its special tokens, since no text can spell them.

    Raises:
        Unsuited: not a deterministic BPE on bytes.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    model, parts = reference.outline["model"], dict(reference.parts)
    if model.get("type") != "BPE":
        raise Unsuited(f"its model is {model.get('type')}, not BPE")
    if model.get("dropout"):
        raise Unsuited("its merges are dropped at random")
    if not model.get("byte_fallback"):
        if "ByteLevel" not in _kinds(reference.outline.get("pre_tokenizer")):
            raise Unsuited("its BPE does not work on bytes")
        missing = [byte for byte in sorted(ByteLevel.alphabet()) if not reference.has_token(byte)]
        if missing:
            parts["vocab"] = _joined(parts["vocab"], {byte: reference.vocab_size + i for i, byte in enumerate(missing)})
    parts["merges"] = _paired(parts.get("merges", b"[]"))
    # Added tokens that are matched in any text: each amid letters, and amid white space.
    added = [token for token in reference.outline["added_tokens"] if not token["special"]]
    samples = ["a{0}b {0} \n{0}".format(token["content"]) for token in added]
    # gigatoken looks for all of them before it composes, which may make one, or change its last character.
    after_composing = [token for token in added if token.get("normalized") and not token["content"].isspace()]
    composed = bool(after_composing) and "NFC" in _kinds(reference.outline.get("normalizer"))
    return Definition(definition_of(reference.outline | {"added_tokens": added}, parts), samples, composed)


def _kinds(step: dict[str, Any] | None) -> list[str]:
    if step is None:
        return []
    inner = [*step.get("pretokenizers", []), *step.get("normalizers", [])]
    return [step["type"], *(kind for one in inner for kind in _kinds(one))]


def _joined(vocab: bytes, tokens: dict[str, int]) -> bytes:
    """A vocabulary in JSON with some tokens more, which it lacks."""
    import orjson

    return b"".join([vocab[:-1], b"," if len(vocab) > 2 else b"", orjson.dumps(tokens)[1:]])


def _paired(merges: bytes) -> bytes:
    """Merges in JSON without white space as pairs, which gigatoken reads faster: of "left right", else as they are."""
    if not merges.startswith(b'["'):
        return merges
    # With what is escaped out of the way, by bytes that no JSON has, quotation marks stand around merges alone.
    bare = merges.replace(b"\\\\", b"\x00").replace(b'\\"', b"\x01")
    pairs = bare.replace(b'","', b'"],["').replace(b" ", b'","')
    return b"".join([b"[", pairs.replace(b"\x01", b'\\"').replace(b"\x00", b"\\\\"), b"]"])


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
    # In the order that is asked for but for ties, which spares the sorting below nearly all its work.
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):
        lefts = [n for n in range(len(piece) - 1, 0, -1) if piece[:n] in scores and piece[n:] in scores]
        score = -scores[piece]
        ranked += [(score, -n, piece[:n], piece[n:]) for n in lefts]
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
            pieces.append(_usual_piece(value) or _piece(value))
        elif number in specs:
            specs[number] |= dict(_fields(value))
    return pieces, specs[2], specs[3]


def _usual_piece(message: bytes) -> tuple[str, float, int] | None:
    """`_piece` of one written as usual, many times faster: a short text, a score, a type unless it is normal."""
    if len(message) < 8 or message[0] != TEXT_KEY or message[1] > 127:
        return None
    score_at = 2 + message[1]
    kind = message[score_at + 5 :]
    if message[score_at : score_at + 1] != SCORE_KEY or (kind and (len(kind) != 2 or kind[0] != TYPE_KEY)):
        return None
    (score,) = SCORE.unpack_from(message, score_at + 1)
    return message[2:score_at].decode("utf-8"), score, kind[1] if kind else NORMAL


def _piece(message: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(message))
    (score,) = SCORE.unpack(fields.get(2, bytes(4)))
    return fields[1].decode("utf-8"), score, fields.get(3, NORMAL)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a serialised protobuf message: an int, or bytes."""
    at, sizes = 0, {1: 8, 5: 4}
    while at < len(message):
        # Nearly all fields of a model are pieces.
        if message[at] == TEXT_KEY and message[at + 1] < 128:
            start, at = at + 2, at + 2 + message[at + 1]
            yield 1, message[start:at]
            continue
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
