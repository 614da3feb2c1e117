"""A fast tokenizer has sentencepiece's own ids on every text, or is not written."""

import functools
import io
import itertools
import json
import random

import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import Tokenizer as RustTokenizer

from tests.builders import THINGS
from vlm.checkpoints import fast_export
from vlm.checkpoints.fast_export import fast_files
from vlm.errors import CheckpointError
from vlm.text.config import TokenizerConfig
from vlm.text.fast_vocabulary import FastVocabulary
from vlm.text.sentencepiece_vocabulary import SentencePieceVocabulary
from vlm.text.tokenizer import Tokenizer
from vlm.text.vocabulary import NewPiece

CORPUS = [
    *(text for pair in THINGS for text in pair),
    "A man in a Blue shirt is standing on a ladder, cleaning a window; 3 dogs watch him!",
    "Two young girls (aged 7 and 10) are playing with 245 colourful balls in the park.",
    "What is it? It's a quick brown fox / a lazy dog: see 'zebra' & \"jukebox\" <here>.",
    "一个穿着蓝色衬衫的男人站在梯子上擦窗户，３只狗看着他！",
    "两个小女孩在公园里玩２４５个彩色的球（她们７岁和１０岁）。",
    "哈哈哈，真好笑……那只猫在垫子上睡觉、做梦吗？",
] * 3

PARTS = (
    ["the", "a", "dog", "cat", "shirt", "Blue", "'s", "ladders", "245", "7", "zebra", "xyz"],
    ["一只", "猫", "男人", "蓝色的", "在", "垫子上", "哈哈", "球", "吗", "龘"],
    [" ", " ", "  ", "   ", "\n", "\t", "\r\n", "\u3000"],
    list("ＡＢｃ１２，！？。…'\"()<>/&-_|▁"),
    [
        "é",
        "e\u0301",
        "E\u0301",
        "か\u3099",
        "ｶﾞ",
        "ß",
        "İ",
        "½",
        "①",
        "™",
        "ﬁ",
        "한",
        "\u1112\u1161",
    ],
    ["👍🏽", "👩\u200d👧", "❤\ufe0f", "A🏽", "𠮷", "ก็", "مُحَمَّد", "\x01", "\u200b", "\ufffd"],
    ["</s>", "<s>", "<unk>", "<pad>", "<0x41>", "/s>", "[U]", "uu", "uuu", "Ａb"],
)
KINDS = ("unigram", "bpe")
USER_DEFINED = ("[U]", "uu", "uuu", "▁", "Ａb", "蓝色")


def random_texts(number: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    texts = []
    for _ in range(number):
        parts = rng.sample(PARTS, rng.randint(1, 4))
        texts.append("".join(rng.choice(rng.choice(parts)) for _ in range(rng.randint(0, 12))))
    return texts


@pytest.fixture(autouse=True, scope="module")
def normalised_once():
    """Normalise all characters once by each rule, which would take most of the time."""
    original, found = fast_export._normalised, {}

    def normalised(proto):
        rule = proto.normalizer_spec.SerializeToString()
        if rule not in found:
            found[rule] = original(proto)
        return found[rule]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_export, "_normalised", normalised)
        yield


@functools.cache
def trained(kind="unigram", *, rule="nmt_nfkc_cf", user_defined=(), **options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type=kind, vocab_size=580,
        hard_vocab_limit=False, normalization_rule_name=rule, pad_id=3, num_threads=1,
        user_defined_symbols=list(user_defined), minloglevel=2, **options,
    )  # fmt: skip
    return model.getvalue()


def made(pieces, kind=TrainerSpec.UNIGRAM, *, user_defined=(), **trainer) -> bytes:
    """Return a model of pieces with scores, which leaves spaces as they are."""
    proto = ModelProto()
    for piece, of_type in (("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<pad>", 3)):
        proto.pieces.add(piece=piece, score=0.0, type=of_type)
    for piece, score in pieces.items():
        proto.pieces.add(piece=piece, score=score, type=1)
    for piece in user_defined:
        proto.pieces.add(piece=piece, score=0.0, type=4)
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.trainer_spec.model_type = kind
    for name, value in trainer.items():
        setattr(proto.trainer_spec, name, value)
    return proto.SerializeToString()


LETTERS = {letter: -3.0 - index / 7 for index, letter in enumerate("abcdeklnprsu<>/▁xy")}


def tokenizer_of(model: bytes, **changes) -> Tokenizer:
    config = {"begin_of_text": "<s>", "end_of_text": "</s>", "padding": "<pad>"} | changes
    vocabulary = SentencePieceVocabulary(model)
    return Tokenizer(vocabulary, TokenizerConfig(**{"context_length": 32} | config))


def fast(tokenizer: Tokenizer) -> RustTokenizer:
    return RustTokenizer.from_buffer(fast_files(tokenizer)["tokenizer.json"])


def assert_same_ids(model: bytes, texts, **changes) -> None:
    tokenizer = tokenizer_of(model, **changes)
    rust = fast(tokenizer)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    begin, end = processor.piece_to_id(["<s>", "</s>"])
    for text in texts:
        assert rust.encode(text).ids == [begin, *processor.encode(text), end], repr(text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("byte_fallback", [False, True], ids=["no bytes", "bytes"])
@pytest.mark.parametrize("user_defined", [(), USER_DEFINED], ids=["none", "user-defined"])
@pytest.mark.parametrize("prefix", [False, True], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("trimmed", [False, True], ids=["spaces kept", "spaces trimmed"])
def test_the_ids_are_sentencepieces_own(kind, byte_fallback, user_defined, prefix, trimmed):
    model = trained(
        kind,
        rule="nmt_nfkc" if prefix is trimmed else "identity",
        user_defined=user_defined,
        byte_fallback=byte_fallback,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=trimmed,
    )
    assert_same_ids(model, random_texts(400))


@pytest.mark.parametrize("rule", ["identity", "nfkc", "nfkc_cf", "nmt_nfkc", "nmt_nfkc_cf"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_normaliser_is_kept(kind, rule):
    model = trained(kind, rule=rule, byte_fallback=True, user_defined=("▁", "[U]"))
    assert_same_ids(model, random_texts(800, seed=1))


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nmt_nfkc_cf"])
def test_accents_are_composed_where_sentencepiece_composes_them_only(rule):
    letters, marks = "aeiouoOAEsxQ中かｶñ", "\u0301\u0302\u0323\u0307\u0308\u031b\u3099\u064e\u0651"
    rng = random.Random(0)
    texts = [
        "".join(
            rng.choice(letters) + rng.choice(("", *marks, "\u0323\u0302", "\u0302\u0301"))
            for _ in range(6)
        )
        for _ in range(500)
    ]
    texts = [text for text in texts if "ｶ" not in text or "ｶ\u3099" in text]
    assert_same_ids(trained(rule=rule, byte_fallback=True), texts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cleaning", ["lower", "glm", "words"])
def test_cleaning_is_done_first(kind, cleaning):
    blanks = tuple(f"<|blank_{length}|>" for length in range(2, 11))
    model = trained(kind, rule="nmt_nfkc", user_defined=blanks, remove_extra_whitespaces=False)
    tokenizer = tokenizer_of(model, cleaning=cleaning)
    texts = [*random_texts(300), *("a" + " " * length + "b" for length in range(35)), "ΟΔΟΣ ΣΑΣ!"]
    begin, end = tokenizer.special_ids.begin_of_text, tokenizer.special_ids.end_of_text
    rust = fast(tokenizer)
    for text, row in zip(texts, tokenizer.split(texts), strict=True):
        assert rust.encode(text).ids == [begin, *row, end], repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_spells_a_special_piece_is_its_characters(kind):
    rust = fast(tokenizer_of(trained(kind, byte_fallback=True)))
    for name in ("<s>", "</s>", "<pad>", "<unk>", "<0x41>"):
        assert rust.token_to_id(name) not in rust.encode(f"{name} x{name}").ids[1:-1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_user_defined_pieces_are_found_whole_before_they_are_normalised(kind):
    model = trained(kind, user_defined=("[CLS]", "ＸＹ", "abc", "abcd"), byte_fallback=True)
    texts = ["[CLS]", "[cls]", "the[CLS]dog", "ＸＹ xy", "ａｂｃｄ abcde abc", " [CLS]  [CLS] "]
    assert_same_ids(model, texts)
    assert "[CLS]" in fast(tokenizer_of(model)).encode("The[CLS]dog").tokens


def test_of_thousands_of_user_defined_pieces_the_longest_from_the_left_is_taken():
    rng = random.Random(0)
    characters = "".join(map(chr, range(0x4E00, 0x4E00 + 60))) + "abcd|-^].?"
    words = {"".join(rng.choice(characters) for _ in range(rng.randint(2, 4))) for _ in range(4000)}
    pieces = {character: -float(i) for i, character in enumerate(characters)} | LETTERS
    model = made(pieces, TrainerSpec.BPE, user_defined=sorted(words - set(pieces)))
    texts = ["".join(rng.choice(characters) for _ in range(20)) for _ in range(500)]
    assert_same_ids(model, texts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_extended_and_reduced_vocabularies_are_kept(kind):
    vocabulary = SentencePieceVocabulary(trained(kind, byte_fallback=True))
    extended = vocabulary.with_pieces([NewPiece("zebras", 1e-4), NewPiece("垫子上睡", 1e-4)])
    reduced, _ = extended.reduced_to(range(0, len(extended), 2))
    for changed in (extended, reduced):
        (model,) = changed.files().values()
        assert_same_ids(model, [*random_texts(300), "ten zebras在垫子上睡觉"])


def test_runs_of_one_character_are_merged_from_the_left():
    pieces = {"aa": -1.0, "aaa": -2.0, "aaaa": -3.0, "ab": -4.0, "aab": -5.0} | {
        letter: score - 10 for letter, score in LETTERS.items()
    }
    texts = ["".join(run) for run in itertools.product("ab", repeat=8)]
    assert_same_ids(made(pieces, TrainerSpec.BPE), texts)


@pytest.mark.slow
def test_spaces_that_are_not_escaped_are_kept():
    proto = ModelProto.FromString(made(LETTERS | {" ": -2.0, " a": -2.5, "a ": -2.6}))
    proto.normalizer_spec.escape_whitespaces = False
    for prefix, trimmed in itertools.product([False, True], repeat=2):
        proto.normalizer_spec.add_dummy_prefix = prefix
        proto.normalizer_spec.remove_extra_whitespaces = trimmed
        texts = ["", " ", "  a", "a  b a ", "▁a▁ "]
        assert_same_ids(proto.SerializeToString(), texts)


def test_two_orders_of_the_same_pieces_may_change_places():
    # Added in 32 bits, the scores of one order are greater than those of the other.
    model = made(LETTERS | {"kk": -4.1234567, "kkkk": -7.7654321})
    tokenizer = tokenizer_of(model)
    rust = fast(tokenizer)
    texts = ["ab" * length + "k" * run for length in range(40) for run in (3, 5, 7)]
    pairs = [
        (row, rust.encode(text).ids[1:-1])
        for text, row in zip(texts, tokenizer.split(texts), strict=True)
    ]
    assert all(sorted(row) == sorted(ids) for row, ids in pairs)
    assert any(row != ids for row, ids in pairs)


def test_the_settings_are_those_of_the_tokenizer():
    model = trained("bpe")
    files = fast_files(tokenizer_of(model, truncation="left", begin_of_text=None, padding="</s>"))
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    settings = json.loads(files["tokenizer_config.json"])
    assert settings == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 32,
        "truncation_side": "left",
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    definition = json.loads(files["tokenizer.json"])
    assert definition["truncation"] is definition["padding"] is None
    rust = RustTokenizer.from_str(files["tokenizer.json"].decode())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert rust.encode("a dog").ids == [*processor.encode("a dog"), processor.eos_id()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", [False, True], ids=["no prefix", "prefix"])
def test_ids_are_decoded_as_sentencepiece_decodes_them(kind, prefix):
    model = trained(kind, add_dummy_prefix=prefix, byte_fallback=True)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    rust = fast(tokenizer_of(model))
    for text in [*CORPUS[: len(CORPUS) // 3], "龘 𠮷 👍🏽"]:
        ids = processor.encode(text)
        assert rust.decode(ids) == processor.decode(ids)


def test_this_package_reads_the_file_with_the_same_ids():
    tokenizer = tokenizer_of(trained(byte_fallback=True, user_defined=("▁",)))
    vocabulary = FastVocabulary(fast_files(tokenizer)["tokenizer.json"])
    texts = random_texts(300, seed=2)
    assert vocabulary.encode(texts) == tokenizer.split(texts)
    assert len(vocabulary) == tokenizer.vocab_size


@pytest.mark.slow
def test_the_files_are_the_same_bytes_each_time():
    tokenizer = tokenizer_of(trained("bpe", user_defined=USER_DEFINED))
    assert fast_files(tokenizer) == fast_files(tokenizer)


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        (trained, {"cleaning": "clip"}, "CLIP's cleaning has no equal there"),
        (lambda: trained("char"), {}, "the model is neither unigram nor BPE"),
        (lambda: trained(treat_whitespace_as_suffix=True), {}, "the model puts spaces after words"),
        (
            lambda: trained(user_defined=tuple(f"A{index}" for index in range(300))),
            {},
            "the normaliser would change 300 user-defined pieces",
        ),
    ],
    ids=["cleaning", "kind", "suffix", "user-defined"],
)
def test_a_tokenizer_of_another_kind_is_refused_with_the_reason(model, changes, said):
    with pytest.raises(CheckpointError, match=f"^no fast tokenizer gives the same ids: {said}$"):
        fast_files(tokenizer_of(model(), **changes))


def test_unused_pieces_are_refused():
    proto = ModelProto.FromString(trained())
    proto.pieces[-1].type = ModelProto.SentencePiece.UNUSED
    with pytest.raises(CheckpointError, match="unused pieces"):
        fast_files(tokenizer_of(proto.SerializeToString()))


def test_merges_of_one_score_are_refused_with_the_number_of_texts_that_differ():
    # sentencepiece takes the leftmost of them, a fast tokenizer the first in its list.
    pieces = LETTERS | {"bc": -1.0, "ab": -1.0, "cd": -1.0}
    model = made(pieces, TrainerSpec.BPE)
    assert sentencepiece.SentencePieceProcessor(model_proto=model).encode("abc", out_type=str) == [
        "ab",
        "c",
    ]
    with pytest.raises(CheckpointError, match="checked texts differ, such as '") as error:
        fast_files(tokenizer_of(model))
    differing, _, checked = str(error.value).split(": ")[1].split()[:3]
    assert 0 < int(differing) < int(checked)


def test_a_special_piece_that_pieces_cross_everywhere_is_refused():
    with pytest.raises(CheckpointError, match="checked texts differ"):
        fast_files(tokenizer_of(made(LETTERS | {"<s": -4.0, "s>": -4.5})))
