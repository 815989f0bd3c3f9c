import io
import itertools
import json
import random
import sys
import tracemalloc
import unicodedata

import numpy as np
import orjson
import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from megacpt.data.text import long_string
from megacpt.data.text.documents import Block
from megacpt.data.tokens import fast_tokenizer, long_texts
from megacpt.data.tokens.encode import Encoding, encode_block
from megacpt.data.tokens.fast_tokenizer import Characters, FastTokenizer, chosen_engine, open_tokenizer
from megacpt.data.tokens.long_texts import decode_text, encode_texts
from megacpt.data.tokens.tokenizer import load_tokenizer
from megacpt.errors import UserError
from tests.conftest import SHARED

pytest.importorskip("gigatoken", reason="the fast engine, gigatoken, is not installed")

SPECIALS = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
SENTENCE = (
    "The patients' trial wasn't blinded: they'll TAKE 12345 mg/day, naïve größe İstanbul 患者 治療 лечение עברית हिन्दी"
)
WORDS = SENTENCE.split()
CORPUS = [" ".join(random.Random(i).choices(WORDS, k=40)) + "\n\n\t  </s> <s> == ... aaaa abab" for i in range(300)]


def byte_level(pattern=None, normalizer=None, **model):
    library = Library(models.BPE(**model))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        library.pre_tokenizer = pre_tokenizers.Sequence([split, library.pre_tokenizer])
    if normalizer:
        library.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    return library


def gpt2():
    return byte_level()


def llama3():
    library = byte_level(LLAMA_3, ignore_merges=True)
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return library


def qwen():
    library = byte_level(LLAMA_3.replace("{1,3}", ""), normalizers.NFC())
    library.add_tokens([AddedToken("<tool>", special=False, normalized=False), AddedToken("  ", special=False)])
    return library


def without_some_bytes():
    library = byte_level()
    spec = json.loads(library.to_str())
    for byte in pre_tokenizers.ByteLevel.alphabet():
        if byte not in map(chr, range(33, 127)) and len(spec["model"]["vocab"]) > 1100:
            spec["model"]["vocab"].pop(byte)
            spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if byte not in "".join(pair)]
    vocab = spec["model"]["vocab"]
    spec["model"]["merges"] = [
        [left, right] for left, right in spec["model"]["merges"] if left in vocab and right in vocab
    ]
    return Library.from_str(json.dumps(spec))


def sentencepiece_model(**options):
    model = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "required_chars": "\t",
        "vocab_size": 600,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    iterator = iter([*CORPUS, "a" * 9, "  " * 9])
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iterator, model_writer=model, **defaults | options)
    return model.getvalue()


def llama2_as_json():
    """A SentencePiece BPE as a tokenizer.json has it: bytes to fall back on, and no pre-tokenizer."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *dict.fromkeys("".join(CORPUS[:20]) + "▁")]
    merges = [("a", "a"), ("aa", "aa"), ("a", "b"), ("▁", "▁"), ("▁", "t"), ("t", "h"), ("▁", "th"), ("▁▁", "▁▁")]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *map("".join, merges)]))}
    library = Library(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.ByteFallback()
    library.add_special_tokens(SPECIALS[:3])
    return library


MAKERS = [gpt2, llama3, qwen, without_some_bytes, llama2_as_json, sentencepiece_model, "SmolLM2", "Mistral"]


def saved(make, folder):
    """(type, path) of a tokenizer."""
    if isinstance(make, str):
        name = {"SmolLM2": "smollm2_tokenizer.json.gz", "Mistral": "mistral_v1_32000.model"}[make]
        if not SHARED.is_dir():
            pytest.skip("the shared tokenizers are not beside this checkout")
        path = SHARED / "data" / "tokenizer" / name
        return "SentencePieceTokenizer" if path.suffix == ".model" else "HuggingFaceTokenizer", path
    made = make()
    if isinstance(made, bytes):
        path = folder / "t.model"
        path.write_bytes(made)
        return "SentencePieceTokenizer", path
    made.save(str(folder / "tokenizer.json"))
    return "HuggingFaceTokenizer", folder / "tokenizer.json"


@pytest.fixture(scope="module", params=MAKERS, ids=lambda make: make if isinstance(make, str) else make.__name__)
def pair(request, tmp_path_factory):
    """(fast, reference)."""
    kind, path = saved(request.param, tmp_path_factory.mktemp("tokenizer"))
    return open_tokenizer(kind, path, "fast"), load_tokenizer(kind, path)


def assert_equal(pair, texts):
    for framed in (False, True):
        found, expected = (tokenizer.encode_flat(texts, framed) for tokenizer in pair)
        for one, other, dtype in zip(found, expected, (np.int32, np.int32, np.int64), strict=True):
            assert one.dtype == other.dtype == dtype
            np.testing.assert_array_equal(one, other)


FRAGMENTS = st.one_of(
    st.sampled_from([*SPECIALS, "<|im_start|>", "<tool>", "<0x0A>", "▁", "\ufdd0</s>\ufdd0", "[INST]", "</", "s>"]),
    st.sampled_from([" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x85", "\x00", "\x04", "\x7f"]),
    st.sampled_from(["'s", "'S", "'ſ", "’t", "'LL", "e\u0301", "\u0301\u0301", "👩‍⚕️", "🏳️‍🌈", "🇩🇪", "\ufdd0", "\uffff"]),
    st.sampled_from(WORDS),
    st.text(max_size=6),
    st.text(st.characters(codec="ascii"), max_size=8),
    st.tuples(st.characters(codec="utf-8"), st.integers(2, 70)).map(lambda run: run[0] * run[1]),
    st.tuples(st.sampled_from(" \n\ta1.A本"), st.integers(2, 400)).map(lambda run: run[0] * run[1]),
)
TEXTS = st.lists(st.lists(FRAGMENTS, max_size=12).map("".join), max_size=4)


@settings(max_examples=250, deadline=None)
@given(texts=TEXTS)
def test_any_texts_are_encoded_as_the_reference_does(pair, texts):
    assert_equal(pair, texts)


def test_real_texts_and_long_ones(pair):
    assert_equal(pair, [])
    assert_equal(
        pair, ["", *CORPUS[:30], "", "\n".join(CORPUS), "a" * 30_000, " " * 30_000, "1" * 3_000 + "本" * 3_000]
    )


def ids_of(encoded):
    """All ids of encoded texts."""
    return np.concatenate([np.empty(0, encoded.tokens.dtype), *encoded.tokens.arrays()])


class Sized:
    """A tokenizer that notes the longest text that it is given."""

    def __init__(self, inner):
        self._inner, self.longest = inner, 0

    def encode(self, text, add_special_tokens=False):
        self.longest = max(self.longest, len(text))
        return self._inner.encode(text, add_special_tokens)

    def encode_flat(self, texts, add_special_tokens=False):
        self.longest = max([self.longest, *map(len, texts)])
        return self._inner.encode_flat(texts, add_special_tokens)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(texts=[" " * 61])  # where a last space changes more than pieces share
@given(texts=st.lists(st.lists(FRAGMENTS | st.just(" of the blood "), max_size=40).map("".join), max_size=4))
def test_pieces_of_long_texts_have_the_ids_of_the_whole(pair, monkeypatch, texts):
    monkeypatch.setattr(long_texts, "LONG", 60)
    monkeypatch.setattr(long_texts, "SHARED", 20)
    monkeypatch.setattr(long_string, "LONG", 30)
    monkeypatch.setattr(long_string, "PIECE", 60)
    expected = pair[1].encode_flat(texts, True)
    where_they_lie = [long_string.loads(orjson.dumps({"text": text}))["text"] for text in texts]
    for tokenizer, these in itertools.product(pair, (texts, where_they_lie)):
        found = encode_texts(tokenizer, these, np.dtype("<u2"))
        assert found.lengths.dtype == np.int32
        for one, other in zip((ids_of(found), *found[1:]), expected, strict=True):
            np.testing.assert_array_equal(one, other)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(FRAGMENTS | st.just(" of the blood "), max_size=40).map("".join))
def test_pieces_of_many_ids_have_the_text_of_all(pair, monkeypatch, text):
    monkeypatch.setattr(long_texts, "IDS", 30)
    monkeypatch.setattr(long_texts, "BESIDE", 8)
    ids = pair[1].encode(text)
    found, expected = decode_text(pair[1], ids), pair[1].decode(ids)
    assert str(found) == expected
    if not isinstance(found, str):
        assert (len(found), found.text_bytes) == (len(expected), len(expected.encode()))


@pytest.mark.parametrize("part", ["\n".join(CORPUS[:5]), "患者接受了治疗。", "a"])
def test_many_ids_are_decoded_in_pieces(pair, request, monkeypatch, part):
    monkeypatch.setattr(long_texts, "IDS", 100)
    monkeypatch.setattr(long_texts, "BESIDE", 20)
    ids = pair[1].encode(part * (50_000 // len(part)))
    found = decode_text(pair[1], ids)
    assert str(found) == pair[1].decode(ids)
    # Those made here without a decoder have spaces between tokens.
    whole = request.node.callspec.params["pair"] in (gpt2, llama3, qwen, without_some_bytes)
    assert whole or len(list(found.pieces())) > len(ids) // 110


def test_long_texts_are_cut(pair, monkeypatch):
    monkeypatch.setattr(long_texts, "LONG", 6_000)
    sized = Sized(pair[0])
    text = "\n".join(CORPUS)
    ids = ids_of(encode_texts(sized, [text, "the end"], np.dtype("<u4")))
    np.testing.assert_array_equal(ids, pair[1].encode_flat([text, "the end"], True).ids)
    assert 4_000 < sized.longest < 9_000 < len(text)


RUNS = [
    "患者接受了治疗。",
    "本",
    "12 345.6\n",
    "7",
    "a;b\n\n",
    "a",
    "acgtta",
    "GATTACA",
    " ",
    "\n",
    ".",
    "👩‍⚕️",
    "e\u0301",
]


@pytest.mark.parametrize("part", RUNS)
def test_long_texts_without_words_are_cut(pair, monkeypatch, part):
    monkeypatch.setattr(long_texts, "LONG", 6_000)
    sized = Sized(pair[0])
    letters = random.Random(0).choices(part, k=20_000)
    for text in (part * (20_000 // len(part)), "".join(letters)):
        ids = ids_of(encode_texts(sized, [text], np.dtype("<u4")))
        np.testing.assert_array_equal(ids, pair[1].encode(text, True))
    assert sized.longest < 10_000


def test_a_long_document_takes_no_more_than_its_line_twice_and_its_ids(tmp_path):
    """A character of four bytes makes a str of four bytes a character."""
    kind, path = saved(llama3, tmp_path)
    tokenizer = open_tokenizer(kind, path, "fast")
    text = " ".join(itertools.islice(itertools.cycle(WORDS), 5_000_000)) + " \U0001f600"
    block = Block("a.jsonl", 1, 0, orjson.dumps({"text": text}))
    expected, size = len(text.encode()), len(block.lines)
    assert size > 2 * long_string.LONG
    del text
    tokenizer.encode("what is proven at first")
    tracemalloc.start()
    try:
        encoded = encode_block(
            block, Encoding(("text",), kind, str(path), append_eod=False, skip_invalid=False), tokenizer
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert encoded.text_bytes[0].tolist() == [expected]
    assert peak < 1.2 * sum(ids.nbytes for ids in encoded.tokens[0].arrays()) + size


def test_a_text_without_a_place_to_cut_is_encoded_whole(monkeypatch):
    """As by this tokenizer, to which all that went before matters."""
    monkeypatch.setattr(long_texts, "LONG", 100)
    monkeypatch.setattr(long_texts, "SHARED", 20)

    class Whole:
        def encode(self, text, add_special_tokens=False):
            return np.cumsum([ord(character) for character in text], dtype=np.int32) % 1009

    text = "a word " * 100
    ids = ids_of(encode_texts(Whole(), [text], np.dtype("<u2")))
    np.testing.assert_array_equal(ids, Whole().encode(text))


def test_no_cut_where_a_token_goes_across(monkeypatch):
    monkeypatch.setattr(long_texts, "LONG", 50)
    vocab = {piece: i for i, piece in enumerate(["<unk>", "o", "f", "t", "h", "e", " ", "of", "of ", "of t"])}
    library = Library(models.BPE(vocab, [("o", "f"), ("of", " "), ("of ", "t")], unk_token="<unk>"))

    class Reference:
        def encode(self, text, add_special_tokens=False):
            return np.array(library.encode(text).ids, np.int32)

    for text in ("of the " * 30, "the of " * 30):
        ids = ids_of(encode_texts(Reference(), [text], np.dtype("<u2")))
        np.testing.assert_array_equal(ids, library.encode(text).ids)


def test_every_character_that_is_not_doubtful_is_classified_alike(tmp_path):
    kind, path = saved(llama3, tmp_path)
    fast, reference = open_tokenizer(kind, path, "fast"), load_tokenizer(kind, path)
    characters = [chr(c) for c in range(0x80, sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    settled = [c for c in characters if c < "\u0800" or unicodedata.category(c) not in ("Co", "Cn")]
    # The apostrophe joins what follows only after a letter or a number; digits go by three from where a number starts.
    for text in ("{}'t", "1{}23456"):
        lines = [text.replace("{}", c) for c in settled]
        texts = ["\n".join(lines[i : i + 500]) for i in range(0, len(lines), 500)]
        for one, other in zip(fast.encode_flat(texts), reference.encode_flat(texts), strict=True):
            np.testing.assert_array_equal(one, other)


def test_doubtful_characters():
    texts = ["", "a\u0378é", "患者", "ab\ufdd0", "\U0001f600 \U000323b0", "\ue000\U0010fffd", "\U000e0fff", "😀"]
    characters = Characters()
    for _ in range(2):
        assert characters.doubtful([text.encode() for text in texts]) == [3, 4, 6]
    assert characters.doubtful([]) == []


def test_texts_with_doubtful_characters_go_to_the_reference(pair, monkeypatch):
    fast, reference = pair
    sent = []
    monkeypatch.setattr(fast._reference, "encode", lambda text: sent.append(text) or reference.encode(text))
    assert_equal(pair, ["plain", "a\ufdd0b", "naïve 患者"])
    assert set(sent) == {"a\ufdd0b"}


def test_added_tokens_that_are_looked_for_in_composed_text(tmp_path):
    library = byte_level(LLAMA_3, normalizers.NFC())
    library.add_tokens(["Café", "trial", "<K>", "  "])
    library.save(str(tmp_path / "tokenizer.json"))
    fast, reference = (open_tokenizer("HuggingFaceTokenizer", tmp_path, engine) for engine in ("fast", "reference"))
    texts = [
        "Cafe\u0301",
        "Café",
        "the trial",
        "the trial\u0301",
        "<K>",
        "<\u212a>",
        "<K>\u0338",
        "  \u0301",
        "e\u0301",
    ]
    assert_equal((fast, reference), [f"a {text} b" for text in texts])


def test_caches_are_emptied(pair, monkeypatch):
    fast, _ = pair
    monkeypatch.setattr(fast_tokenizer, "CACHE_BYTES", -(1 << 40))
    before = fast._engine
    assert_equal(pair, ["the first", "and the second"])
    assert fast._engine is not before


def test_reference_on_request_and_engines_by_name(tmp_path):
    kind, path = saved(gpt2, tmp_path)
    reference, fast = (open_tokenizer(kind, path, engine) for engine in ("reference", "auto"))
    assert reference.engine.startswith("tokenizers 0.")
    assert fast.engine.startswith("gigatoken 0.")
    assert [chosen_engine(t) for t in (reference, fast)] == ["reference", "fast"]
    assert (fast.type, fast.sha256, fast.vocab_size, fast.eod_id) == (
        kind,
        reference.sha256,
        reference.vocab_size,
        reference.eod_id,
    )
    assert fast.decode(fast.encode("the trial")) == reference.decode(reference.encode("the trial"))


def unigram():
    library = Library(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIALS, unk_token="<unk>")
    )
    return library


def bpe_on_characters():
    library = Library(models.BPE(unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS))
    return library


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (unigram, "its model is Unigram, not BPE"),
        (bpe_on_characters, "its BPE does not work on bytes"),
        (lambda: byte_level(dropout=0.5), "its merges are dropped at random"),
        (lambda: byte_level(r"\w+|\W"), "Unknown pre_tokenizer"),
        (lambda: sentencepiece_model(model_type="unigram"), "its model is not BPE"),
        (lambda: sentencepiece_model(byte_fallback=False), "no bytes to fall back on"),
        (lambda: sentencepiece_model(user_defined_symbols=["<tool>"]), "user-defined"),
        (lambda: sentencepiece_model(normalization_rule_name="nmt_nfkc"), "changes the text"),
        (lambda: sentencepiece_model(remove_extra_whitespaces=True), "changes the text"),
        (lambda: sentencepiece_model(treat_whitespace_as_suffix=True), "changes the text"),
    ],
)
def test_the_reference_encodes_what_gigatoken_cannot(tmp_path, capsys, make, reason):
    kind, path = saved(make, tmp_path)
    tokenizer = open_tokenizer(kind, path)
    assert chosen_engine(tokenizer) == "reference"
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert warning.startswith(f"warning: text is encoded by {tokenizer.engine}, at about 3 MB/s a core")
    with pytest.raises(UserError, match=f"no fast engine for this tokenizer .*({reason}).*--tokenizer-engine auto"):
        open_tokenizer(kind, path, "fast")


def test_a_difference_at_the_start_is_noticed(tmp_path, capsys, monkeypatch):
    kind, path = saved(gpt2, tmp_path)
    monkeypatch.setattr(fast_tokenizer, "_gigatoken", lambda definition: Wrong(fast_tokenizer_engine(definition), "é"))
    assert chosen_engine(open_tokenizer(kind, path)) == "reference"
    assert "its ids of" in capsys.readouterr().err


fast_tokenizer_engine = fast_tokenizer._gigatoken


class Wrong:
    """An engine that errs on texts with a certain string."""

    def __init__(self, engine, string):
        self.engine, self.string = engine, string

    def encode(self, text):
        ids = self.engine.encode(text)
        text = text if isinstance(text, str) else text.decode()
        return ids[:-1] if self.string in text else ids


def test_a_difference_in_the_first_real_text_is_noticed(tmp_path, capsys):
    kind, path = saved(gpt2, tmp_path)
    reference = load_tokenizer(kind, path)
    texts = ["plain", "patients"]
    forgiving = open_tokenizer(kind, path)
    assert isinstance(forgiving, FastTokenizer)
    forgiving._engine = Wrong(forgiving._engine, "patients")
    for _ in range(2):
        assert_equal((forgiving, reference), texts)
    assert forgiving.engine == reference.engine
    assert capsys.readouterr().err.count("its ids of 'patients' differ from those of tokenizers") == 1
    strict = open_tokenizer(kind, path, "fast")
    strict._engine = Wrong(strict._engine, "patients")
    with pytest.raises(UserError, match=r"'patients' differ .*; run again with --tokenizer-engine reference"):
        strict.encode_flat(texts)


class Panic(BaseException):
    """As pyo3 has it: no Exception."""


@pytest.mark.parametrize("error", [RuntimeError("it broke"), Panic("it broke\nand more")])
def test_an_engine_that_breaks_is_not_used(tmp_path, capsys, monkeypatch, error):
    def broken(definition):
        raise error

    monkeypatch.setattr(fast_tokenizer, "_gigatoken", broken)
    kind, path = saved(gpt2, tmp_path)
    assert chosen_engine(open_tokenizer(kind, path)) == "reference"
    assert capsys.readouterr().err.endswith("which cannot be used: it broke\n")


def test_a_missing_package_is_said(tmp_path, capsys, monkeypatch):
    kind, path = saved(gpt2, tmp_path)
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    assert chosen_engine(open_tokenizer(kind, path)) == "reference"
    assert "not installed (pip install gigatoken)" in capsys.readouterr().err
