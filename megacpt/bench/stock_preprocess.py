"""The peer that everybody has: a loop over lines, the tokenizer's own library, megatron-core's dataset builder.

python -m megacpt.bench.stock_preprocess FILE.jsonl OUT TYPE TOKENIZER
"""

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from itertools import batched
from pathlib import Path

BATCH = 256


def encoder(kind: str, path: Path) -> tuple[Callable[[list[str]], list[list[int]]], int, int]:
    """A batch encoder, the end-of-document id, and the size of the vocabulary."""
    if kind == "SentencePieceTokenizer":
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return lambda texts: model.encode(texts, num_threads=1), model.eos_id(), model.get_piece_size()
    import tokenizers

    path = path / "tokenizer.json" if path.is_dir() else path
    content = path.read_bytes()
    tokenizer = tokenizers.Tokenizer.from_buffer(gzip.decompress(content) if path.suffix == ".gz" else content)
    ends = [tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|end_of_text|>", "</s>")]

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)]

    return encode, next(end for end in ends if end is not None), tokenizer.get_vocab_size(with_added_tokens=True)


def texts_of(path: Path) -> Iterator[str]:
    """The texts of a JSONL file."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def main() -> None:
    """Encode a file."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    text, out, kind, model = sys.argv[1:]
    encode, end, vocabulary = encoder(kind, Path(model))
    builder = IndexedDatasetBuilder(f"{out}.bin", dtype=DType.optimal_dtype(vocabulary))
    for texts in batched(texts_of(Path(text)), BATCH):
        for ids in encode(list(texts)):
            builder.add_item(torch.tensor([*ids, end]))
            builder.end_document()
    builder.finalize(f"{out}.idx")


if __name__ == "__main__":
    main()
