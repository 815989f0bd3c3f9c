"""Train a SentencePiece tokenizer (BPE with byte fallback, Llama's special ids) on the text of JSONL files.

    python tools/train_tokenizer.py --input a.jsonl b.jsonl --vocab-size 4096 --output tokenizer.model

Normalisation is the identity and documents reach the trainer whole, so newlines, tabs and runs of spaces are learned as
pieces and every text decodes to itself (but U+2581, SentencePiece's own mark for a space, which decodes to a space).
The same input gives the same bytes.
"""

import argparse
import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson
import sentencepiece

from megacpt.errors import UserError, exit_code
from megacpt.files import atomic_write


def documents(paths: Sequence[Path], key: str) -> Iterator[str]:
    """The text under `key` of every row, empty ones left out.

    Raises:
        UserError: a file is missing, or a row is not a JSON object with a string under `key`.
    """
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file; --input takes JSONL files")
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise UserError(
                        f"{path}:{number}: not a JSON object ({error}); repair or remove the line"
                    ) from None
                text = row.get(key) if isinstance(row, dict) else None
                if not isinstance(text, str):
                    raise UserError(f"{path}:{number}: no text under {key!r}; name its key with --json-key")
                if text.strip():
                    yield text


def sample(texts: Iterator[str], most_bytes: int) -> list[str]:
    """Documents worth up to `most_bytes` of UTF-8, picked by their hashes, in their first order."""
    entries = list(enumerate(texts))
    entries.sort(key=lambda entry: hashlib.sha256(entry[1].encode()).digest())
    kept: list[tuple[int, str]] = []
    total = 0
    for number, text in entries:
        total += len(text.encode())
        if kept and total > most_bytes:
            break
        kept.append((number, text))
    return [text for _, text in sorted(kept)]


def train(texts: Sequence[str], vocab_size: int) -> bytes:
    """Train on whole documents; returns the serialised model.

    Raises:
        UserError: there is no text, or it cannot fill a vocabulary of this size.
    """
    if not texts:
        raise UserError("--input holds no text; give files with at least one document")
    model = io.BytesIO()
    longest = max(10, *(len(text.encode()) for text in texts))  # 10 is the least that the trainer takes
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            required_chars="\n\t",
            max_sentence_length=longest,  # the trainer silently drops what is longer
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip().rstrip(".")
        raise UserError(f"--vocab-size {vocab_size} does not suit this text: {reason}") from error
    return model.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a SentencePiece tokenizer on the text of JSONL files.")
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="JSONL")
    parser.add_argument("--json-key", default="text")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--max-megabytes", type=float, default=64, help="train on a sample of at most this much text")
    parser.add_argument("--output", type=Path, required=True, metavar="MODEL")
    options = parser.parse_args(arguments)

    def work() -> None:
        texts = sample(documents(options.input, options.json_key), int(options.max_megabytes * 1e6))
        model = train(texts, options.vocab_size)
        with atomic_write(options.output) as handle:
            handle.write(model)
        print(f"{options.output}: {options.vocab_size:,} pieces from {len(texts):,} documents")

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
