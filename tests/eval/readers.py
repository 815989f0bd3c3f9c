"""A small Llama that can read: random weights, and a tokenizer of its own; and requests as lm_eval makes them."""

from pathlib import Path
from typing import Any

from tests.model.hf.models import make_model

TEXT = (
    "Metformin lowers glucose in the blood. The patient was given a dose of 500 mg twice daily for twelve weeks. "
    "Which of the following is the best treatment? Question: Answer: yes no maybe A B C D. It rained all night, and by "
    "morning the river had reached the lower meadow. The miller said that he had never seen the like of it before."
)
MAX_LENGTH = 64


def write_tokenizer(folder: Path, *, bos: bool) -> None:
    """A byte-level BPE of 400 tokens with <s> and </s>; with `bos`, a text is framed by <s>, as Llama's is."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    named = {"bos_token": "<s>"} if bos else {}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **named).save_pretrained(folder)


def make_reader(folder: Path, *, bos: bool, **changes: Any) -> Path:
    """A Llama with a padded vocabulary (403 of 512 or more rows) that takes inputs of MAX_LENGTH tokens."""
    make_model(folder, "tinyllama", vocab_size=403, max_position_embeddings=MAX_LENGTH, **changes)
    write_tokenizer(folder, bos=bos)
    return folder


def words(start: int, count: int) -> str:
    """Some words of TEXT."""
    parts = TEXT.split()
    return " ".join(parts[(start + i) % len(parts)] for i in range(count))


CHOICES = [
    *((f"Question: {words(start, 12)}\nAnswer:", f" {words(end, 4)}") for start in (0, 7) for end in (3, 9, 20, 31)),
    *((f"Question: {words(start, 20)}\nAnswer:", f" {letter}") for start in (11, 25) for letter in "ABCD"),
]
AWKWARD = [
    ("", " yes"),
    ("", words(3, 5)),
    ("Answer: ", "yes"),
    ("Answer:   ", "no\n\n"),
    (words(0, 90), f" {words(5, 6)}"),  # longer than the model takes
    (words(0, 90), f" {words(6, 3)}"),
    ("<s>Answer:", " yes"),
    ("naïve β-cells", " – 3.14"),
    ("Answer:", " yes"),
    ("Answer:", " yes"),
]
REQUESTS = CHOICES + AWKWARD
DOCUMENTS = [words(0, 5), words(0, 120), words(17, 61), "x"]
PROMPTS: list[tuple[str, dict[str, Any]]] = [
    (f"Question: {words(2, 9)}\nAnswer:", {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}),
    (words(5, 30), {"until": [".", " the"], "max_gen_toks": 12}),
    ("A", {"until": [], "max_gen_toks": 5, "temperature": 0.0}),
]


def instances(kind: str, requests: list[Any]) -> list[Any]:
    """lm_eval's requests."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, number) for number, args in enumerate(requests)]


def all_answers(lm: Any) -> dict[str, list[Any]]:
    """What a language model says to all of them."""
    return {
        "loglikelihood": lm.loglikelihood(instances("loglikelihood", REQUESTS), disable_tqdm=True),
        "rolling": lm.loglikelihood_rolling(
            instances("loglikelihood_rolling", [(text,) for text in DOCUMENTS]), disable_tqdm=True
        ),
        "generated": lm.generate_until(instances("generate_until", PROMPTS), disable_tqdm=True),
    }


def reference(folder: Path, **options: Any) -> Any:
    """lm_eval's own `hf` model on a folder, fp32 on the CPU."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=4, **options) if transformers else None
