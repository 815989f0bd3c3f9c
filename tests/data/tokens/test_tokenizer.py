import gzip
import io
import json
from itertools import chain

import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from megacpt.data.tokens.tokenizer import load_tokenizer
from megacpt.errors import UserError
from tests.conftest import SHARED

SPECIALS = ["<unk>", "<s>", "</s>"]
CORPUS = [f"the patient number {i} was given {i * 7} mg of </ s > drug, and then <s some more" for i in range(400)]
LITERAL = "a </s> b<s></s>c <unk></s>"


def byte_level():
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    library.train_from_iterator(CORPUS, trainer)
    return library


def unigram():
    library = Library(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIALS, unk_token="<unk>")
    )
    return library


def bpe_whose_merges_spell_a_special():
    pieces = [*SPECIALS, *"abc</s>▁unk", "</", "s>", "<s"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("<", "s"), ("<s", ">"), ("<", "s>")]
    library = Library(models.BPE({p: i for i, p in enumerate(dict.fromkeys(pieces))}, merges, unk_token="<unk>"))
    library.normalizer = normalizers.Replace(" ", "▁")
    library.add_special_tokens(SPECIALS)
    return library


def word_level():
    library = Library(models.WordLevel({t: i for i, t in enumerate([*SPECIALS, "a", "b"])}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(SPECIALS)
    return library


LIBRARIES = [byte_level, unigram, bpe_whose_merges_spell_a_special, word_level]


def save(library, folder, **config):
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def train_sentencepiece(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=90,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.mark.parametrize("make", LIBRARIES)
def test_special_strings_stay_text_in_every_kind_of_model(tmp_path, make):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", save(make(), tmp_path / "t", eos_token="</s>"))
    assert tokenizer.eod_id == 2
    ids = tokenizer.encode(LITERAL).tolist()
    # Id 0, the unknown, is what a model gives for what it cannot spell.
    assert not {1, 2} & set(ids)
    assert len(ids) > 2


def test_no_text_reaches_the_hidden_spelling(tmp_path):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", save(word_level(), tmp_path / "t"))
    assert set(tokenizer.encode("\ufdd0</s>\ufdd0 \ufdd0:</s>\ufdd0 a").tolist()) == {0, 3}


@pytest.mark.parametrize("make", LIBRARIES)
def test_other_text_is_encoded_as_the_library_does(tmp_path, make):
    library = make()
    tokenizer = load_tokenizer("HuggingFaceTokenizer", save(library, tmp_path / "t"))
    texts = [*CORPUS[:20], "", " ", "a  b", "é\u00a0\n\n"]
    ids, lengths, text_bytes = tokenizer.encode_flat(texts)
    assert text_bytes.tolist() == [len(text.encode()) for text in texts]
    expected = [encoding.ids for encoding in library.encode_batch(texts)]
    assert (ids.tolist(), lengths.tolist()) == (list(chain(*expected)), list(map(len, expected)))
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int32)
    assert [tokenizer.encode(text).tolist() for text in texts] == expected
    assert tokenizer.vocab_size == max(library.get_vocab(with_added_tokens=True).values()) + 1
    assert tokenizer.decode([2, *expected[0]]) == library.decode([2, *expected[0]], skip_special_tokens=False)


def test_added_tokens_that_are_not_special_are_vocabulary(tmp_path):
    library = byte_level()
    library.add_tokens([AddedToken("<tab>", special=False, normalized=False)])
    library.add_special_tokens(["<|end|>"])
    tokenizer = load_tokenizer("HuggingFaceTokenizer", save(library, tmp_path / "t"))
    tab = library.token_to_id("<tab>")
    assert tab in tokenizer.encode("a<tab>b")
    assert tab + 1 not in tokenizer.encode("a<|end|>b")
    assert tokenizer.vocab_size == tab + 2


def test_a_token_that_only_the_config_calls_special(tmp_path):
    library = byte_level()
    library.add_tokens([AddedToken("<end>", special=False, normalized=False)])
    tokenizer = load_tokenizer("HuggingFaceTokenizer", save(library, tmp_path / "t", eos_token={"content": "<end>"}))
    assert tokenizer.eod_id == library.token_to_id("<end>")
    assert tokenizer.eod_id not in tokenizer.encode("a<end>b")


def test_framing_is_the_post_processors_and_only_when_asked(tmp_path):
    library = byte_level()
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    library.enable_truncation(2)
    library.enable_padding(length=9)
    tokenizer = load_tokenizer("HuggingFaceTokenizer", save(library, tmp_path / "t"))
    plain = tokenizer.encode("the patient </s>").tolist()
    assert len(plain) > 2
    assert plain[0] != 1
    assert tokenizer.encode("the patient </s>", add_special_tokens=True).tolist() == [1, *plain]
    assert tokenizer.encode("", add_special_tokens=True).tolist() == [1]


@pytest.mark.parametrize(
    ("names", "config", "eod"),
    [
        (["<|endoftext|>", "<|im_end|>"], {}, "<|endoftext|>"),
        (["<|endoftext|>", "<|im_end|>"], {"eos_token": "<|im_end|>"}, "<|im_end|>"),
        (["[CLS]", "[SEP]"], {"sep_token": "[SEP]"}, "[SEP]"),
        (["<|im_end|>"], {}, None),
        (["<|endoftext|>", "</s>"], {}, None),
        (["<|im_end|>"], {"eos_token": None}, None),
    ],
)
def test_end_of_document(tmp_path, names, config, eod):
    library = Library(models.BPE({c: i for i, c in enumerate("abc")}, []))
    library.add_special_tokens(names)
    tokenizer = load_tokenizer("HuggingFaceTokenizer", save(library, tmp_path / "t", **config))
    assert tokenizer.eod_id == (None if eod is None else library.token_to_id(eod))


def test_end_of_document_outside_the_vocabulary(tmp_path):
    with pytest.raises(UserError, match="'<eot>' is not in its vocabulary"):
        load_tokenizer("HuggingFaceTokenizer", save(byte_level(), tmp_path / "t", eos_token="<eot>"))


def test_folder_file_and_gzip_are_one_tokenizer(tmp_path):
    folder = save(byte_level(), tmp_path / "t")
    packed = tmp_path / "bare" / "tokenizer.json.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress((folder / "tokenizer.json").read_bytes()))
    paths = [folder, folder / "tokenizer.json", packed, packed.parent]
    assert len({load_tokenizer("HuggingFaceTokenizer", path).sha256 for path in paths}) == 1


def test_sentencepiece(tmp_path):
    path = tmp_path / "a.model"
    path.write_bytes(train_sentencepiece())
    tokenizer = load_tokenizer("SentencePieceTokenizer", path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = [*CORPUS[:10], "", "  "]
    expected = [library.encode(text) for text in texts]
    ids, lengths, text_bytes = tokenizer.encode_flat(texts)
    assert text_bytes.tolist() == [len(text.encode()) for text in texts]
    assert (ids.tolist(), lengths.tolist()) == (list(chain(*expected)), list(map(len, expected)))
    assert [tokenizer.encode(text).tolist() for text in texts] == expected
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (library.get_piece_size(), 2)
    assert not {1, 2} & set(tokenizer.encode(LITERAL).tolist())
    assert not {1, 2} & set(tokenizer.encode(LITERAL, add_special_tokens=True).tolist())
    assert tokenizer.decode(tokenizer.encode(CORPUS[0])) == library.decode(library.encode(CORPUS[0]))


def test_sentencepiece_user_defined_symbols_are_vocabulary_and_control_symbols_are_not(tmp_path):
    path = tmp_path / "a.model"
    path.write_bytes(train_sentencepiece(user_defined_symbols=["<tab>"], control_symbols=["<mask>"], eos_id=-1))
    tokenizer = load_tokenizer("SentencePieceTokenizer", path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.eod_id is None
    assert library.piece_to_id("<tab>") in tokenizer.encode("a<tab>b")
    assert library.piece_to_id("<mask>") not in tokenizer.encode("a<mask>b")


@pytest.mark.parametrize("type_name", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff\x00", b'{"added_tokens": [], "model": {"vocab": {}}}', None]
)
def test_a_foreign_or_missing_file_is_named(tmp_path, type_name, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: .*check --tokenizer-model"):
        load_tokenizer(type_name, path)


def test_damaged_neighbours_are_named(tmp_path):
    folder = save(byte_level(), tmp_path / "t")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not valid JSON"):
        load_tokenizer("HuggingFaceTokenizer", folder)
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b"{}" * 100)[:-9])
    with pytest.raises(UserError, match=r"x\.json\.gz: the tokenizer file cannot be read"):
        load_tokenizer("HuggingFaceTokenizer", tmp_path / "x.json.gz")


def test_unknown_type():
    with pytest.raises(UserError, match="'GPT2BPETokenizer' is unknown; choose one of"):
        load_tokenizer("GPT2BPETokenizer", "x")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared test data are not beside this checkout")
def test_smollm2_and_mistral():
    folder = SHARED / "data" / "tokenizer"
    smollm2 = load_tokenizer("HuggingFaceTokenizer", folder / "smollm2_tokenizer.json.gz")
    assert (smollm2.vocab_size, smollm2.eod_id) == (49_152, 0)
    assert smollm2.decode(smollm2.encode("a<|endoftext|>b <|im_start|>")) == "a<|endoftext|>b <|im_start|>"
    assert min(smollm2.encode("a<|endoftext|>b <|im_start|>")) > 16
    mistral = load_tokenizer("SentencePieceTokenizer", folder / "mistral_v1_32000.model")
    assert (mistral.vocab_size, mistral.eod_id) == (32_000, 2)
    assert min(mistral.encode("a</s><s>b")) > 2
