"""An extended tokenizer says English as before, and Chinese in pieces chosen by their use."""

import io
import math
import random
import re
import unicodedata
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as RustTokenizer, decoders, models, normalizers, pre_tokenizers

from tests.builders import THING_TEXTS, THINGS, unique_captions
from vlm.data.manifest import read_manifest
from vlm.errors import TokenizerError
from vlm.text.cleaning import clean_clip
from vlm.text.config import SentencePieceConfig, TokenizerConfig
from vlm.text.extension import changed, extend, is_extension
from vlm.text.fast_vocabulary import FastVocabulary
from vlm.text.sentencepiece_vocabulary import SentencePieceVocabulary
from vlm.text.tokenizer import Tokenizer, load_tokenizer
from vlm.text.training import train_sentencepiece
from vlm.text.vocabulary import NewPiece
from vlm.text.word_lists import read_word_list, with_traditional
from vlm.text.words import HAN

EMOJI = Path(__file__).parents[2] / "data" / "emoji"

# Shares in sixteenths, so that sums are exact. Characters: 猫 13, 狗 9, 熊 3, 鸟 2, of 27.
WORDS = {"猫狗": 6 / 16, "猫": 4 / 16, "狗熊猫": 3 / 16, "鸟": 2 / 16, "cat": 1 / 16}

OTHERS = (
    "&amp;", "&lt;br&gt;", "&#39;s", "&eacute;", "&amp;amp;", "&nbsp;", "©", "№5", "½", "…", "—",
    "“quoted”", "‘s", "naïve", "Café", "cafe\u0301", "Ångström", "İstanbul", "ſtart", "ﬁsh", "ß",
    "😀", "👍🏽", "👩‍👩‍👧", "🇨🇳", "❤️", "♥", "кот", "Привет", "Ελλάδα", "고양이", "한국어",
    "ねこ", "カタカナ", "ﾈｺ", "ｃａｔ", "１２３", "עברית", "مرحبا", "ไทย", "हिन्दी",
    "\u200b", "\u00ad",
    "\u0345", "\ufeff", "\t", "\n", "\u3000", "、", "。", "（x）", "！", "~~~", "___", "^_^", "<3",
    "<start_of_text>", "<end_of_text>", "<unk>", "</w>", "▁", "##ing", "http://x.org/a?b=c&d=1",
    "I'm", "don't", "they'LL", "it’s", "3D", "4x4", "T-shirt", "U.S.A.", "1,000.5", "x²",
)  # fmt: skip
"""Parts of texts that tokenizers find hard; none holds or becomes a Han character."""


@cache
def english_words() -> tuple[str, ...]:
    """Return English words, the most used first."""
    words = read_word_list("wordfreq", "en")
    return tuple(sorted(words, key=lambda word: -words[word]))


def sentences(count: int, seed: int) -> list[str]:
    """Make texts without Han characters: English words, and among them what is hard."""
    words = english_words()
    common = words[:20_000]
    draw = random.Random(seed)
    forms = (str, str, str, str, str.upper, str.title, str.swapcase)
    made = []
    for _ in range(count):
        parts = [draw.choice(forms)(word) for word in draw.choices(common, k=3)]
        if draw.random() < 0.2:
            parts += [draw.choice(words), str(draw.randrange(10**6))]
        if draw.random() < 0.2:
            parts.append(draw.choice(OTHERS))
        draw.shuffle(parts)
        made.append(draw.choice((" ", " ", ", ", "-", "")).join(parts) + draw.choice(",.!?;: "))
    return made


@pytest.fixture(scope="module")
def captions(emoji):
    """Return the captions of every split by language."""
    samples = [sample for split in read_manifest(EMOJI).splits for sample in emoji(split)]
    return {language: sorted(unique_captions(samples, [language])) for language in ("zh", "en")}


@pytest.fixture(scope="module")
def chinese():
    return read_word_list("wordfreq", "zh")


@pytest.fixture(scope="module")
def extended(clip, chinese):
    return extend(clip, chinese, vocab_size=clip.vocab_size + 12_000)


@pytest.fixture(scope="module")
def small(clip):
    """Return CLIP's tokenizer with 猫, 狗, 熊, 鸟 and their words."""
    return extend(clip, WORDS, vocab_size=clip.vocab_size + 6, coverage=1.0).tokenizer


def train_on_english(**options: object) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(3000, seed=1)), model_writer=model, vocab_size=1200,
        character_coverage=0.99, normalization_rule_name="nmt_nfkc_cf", pad_id=3, minloglevel=2,
        **options,
    )  # fmt: skip
    config = TokenizerConfig(
        context_length=32, begin_of_text="<s>", end_of_text="</s>", padding="<pad>"
    )
    return Tokenizer(SentencePieceVocabulary(model.getvalue()), config)


def word_pieces(*more: str) -> Tokenizer:
    """Make a tokenizer as BERT's, of letters and a few words."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,!?'-&;"]
    pieces = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *letters, *(f"##{x}" for x in letters)]
    pieces += ["cat", "the", "##ing", "red", *more]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    rust = RustTokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    rust.normalizer = normalizers.BertNormalizer(lowercase=True)
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece()
    config = TokenizerConfig(
        context_length=32, begin_of_text="[CLS]", end_of_text="[SEP]", padding="[PAD]"
    )
    return Tokenizer(FastVocabulary(rust.to_str().encode()), config)


BASES = {
    "unigram": train_on_english,
    "unigram with bytes": lambda: train_on_english(byte_fallback=True),
    "BPE": lambda: train_on_english(model_type="bpe"),
    "BPE with bytes": lambda: train_on_english(model_type="bpe", byte_fallback=True),
    "bilingual unigram": lambda: train_sentencepiece(
        THING_TEXTS, SentencePieceConfig(vocab_size=320, context_length=32)
    ),
    "bilingual BPE": lambda: train_sentencepiece(
        THING_TEXTS, SentencePieceConfig(vocab_size=340, context_length=32, model_type="bpe")
    ),
    "WordPiece": word_pieces,
}


@pytest.fixture(scope="module")
def letters():
    """Return a base that is quickly extended."""
    return word_pieces()


@pytest.fixture(scope="module", params=BASES.values(), ids=list(BASES))
def base(request):
    return request.param()


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    pieces = tokenizer.vocabulary.pieces()
    return [pieces[token] for [row] in [tokenizer.split([text])] for token in row]


# What is old stays


@pytest.mark.slow
def test_old_ids_stay_where_they_are(clip, extended):
    new = extended.tokenizer
    assert new.vocabulary.pieces()[: clip.vocab_size] == clip.vocabulary.pieces()
    assert new.vocab_size == clip.vocab_size + 12_000
    assert new.special_ids == clip.special_ids
    assert new.encode(["a cat"]).ids.tolist() == clip.encode(["a cat"]).ids.tolist()


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_clip_splits_a_hundred_thousand_texts_without_chinese_as_before(clip, extended, captions):
    texts = [*captions["en"], *OTHERS, *sentences(98_000, seed=0)]
    texts = [text for text in dict.fromkeys(texts) if not HAN.search(text)]
    assert len(texts) >= 100_000
    assert extended.tokenizer.split(texts) == clip.split(texts)


def test_other_bases_split_texts_without_chinese_as_before(base, chinese, captions):
    texts = [*captions["en"][::5], *OTHERS, *sentences(3000, seed=2)]
    texts = [text for text in texts if not HAN.search(unicodedata.normalize("NFKC", text))]
    words = dict(islice(chinese.items(), 20_000))
    new = extend(base, words, vocab_size=base.vocab_size + 5000, coverage=0.99).tokenizer
    assert changed(base, new, texts) == []
    assert new.vocabulary.pieces()[: base.vocab_size] == base.vocabulary.pieces()


def test_an_extended_tokenizer_is_read_as_it_was_written(extended, captions, tmp_path):
    extended.tokenizer.save(tmp_path)
    read = load_tokenizer(tmp_path)
    assert read.fingerprint == extended.tokenizer.fingerprint
    texts = captions["zh"][:200]
    assert read.split(texts) == extended.tokenizer.split(texts)


# What is new


def test_every_new_piece_is_one_id_of_its_own(clip, extended):
    pieces = extended.tokenizer.vocabulary.pieces()[clip.vocab_size :]
    assert len(set(pieces)) == 12_000 == extended.characters + extended.words
    rows = extended.tokenizer.split(pieces)
    assert rows == [[clip.vocab_size + index] for index in range(len(pieces))]


def test_characters_come_first_and_then_words_of_two_to_four_of_them(clip, extended):
    pieces = extended.tokenizer.vocabulary.pieces()[clip.vocab_size :]
    characters, words = pieces[: extended.characters], pieces[extended.characters :]
    assert {len(character) for character in characters} == {1}
    assert {len(word) for word in words} == {2, 3, 4}
    assert set("".join(words)) <= set(characters)


@pytest.mark.parametrize("right", ["", "s", "'s", " b", "5", "，", "!", "🙂", "й"])
@pytest.mark.parametrize("left", ["", "T", "Big ", "t-", "3", "（", "🙂"])
def test_a_character_has_one_id_wherever_it_stands(clip, small, left, right):
    [before, after] = clip.split([left, right])
    [cat] = small.split(["猫"])[0]
    assert cat >= clip.vocab_size
    assert small.split([f"{left}猫{right}"]) == [[*before, cat, *after]]


def test_other_bases_find_a_character_wherever_it_stands(base):
    new = extend(base, {"恤": 0.75, "猫": 0.25}, coverage=1.0).tokenizer
    shirt = new.vocabulary.id_of("恤")
    assert shirt >= base.vocab_size
    texts = ["恤", "T恤", "恤t", "t恤t", "red 恤 cat", "1恤2", "恤,"]
    rows = new.split(texts)
    assert [row.count(shirt) for row in rows] == [1] * len(texts)


@pytest.mark.slow
def test_the_longest_piece_from_the_left_is_taken(clip):
    words = {"中国人民": 0.4, "国人": 0.3, "中国": 0.2, "人民": 0.1}
    new = extend(clip, words, vocab_size=clip.vocab_size + 8, coverage=1.0).tokenizer
    assert pieces_of(new, "中国人民中国") == ["中国人民", "中国"]
    assert pieces_of(new, "中国人中") == ["中国", "人", "中"]
    assert pieces_of(new, "国人民") == ["国人", "民"]


@pytest.mark.slow
def test_texts_are_cut_at_the_new_pieces_and_split_as_before_between_them(clip, extended, captions):
    new = extended.tokenizer
    pieces = sorted(new.vocabulary.pieces()[clip.vocab_size :], key=len, reverse=True)
    cut = re.compile("(" + "|".join(pieces) + ")")
    texts = [*captions["zh"][::4], *(f"{en}{zh}龘{zh} {en}" for en, zh in THINGS)]
    for text, row in zip(texts, new.split(texts), strict=True):
        parts = cut.split(clean_clip(text))
        between = clip.vocabulary.encode(parts[::2])
        pieces_ids = [[new.vocabulary.id_of(piece)] for piece in parts[1::2]] + [[]]
        expected = [
            i for pair in zip(between, pieces_ids, strict=True) for ids in pair for i in ids
        ]
        assert row == expected


def test_what_got_no_piece_is_said_in_bytes_as_before(clip, small):
    assert small.split(["龘", "an 龘"]) == clip.split(["龘", "an 龘"])
    assert small.decode(small.split(["龘猫狗"])[0]).replace(" ", "") == "龘猫狗"


# The choice


@pytest.mark.parametrize(
    ("coverage", "characters", "reached"),
    [
        (0.3, "猫", 13),
        (0.5, "猫狗", 22),
        (0.9, "猫狗熊", 25),
        (0.95, "猫狗熊鸟", 27),
        (1.0, "猫狗熊鸟", 27),
    ],
)
def test_characters_are_chosen_by_use_until_the_coverage_is_reached(
    letters, coverage, characters, reached
):
    extension = extend(letters, WORDS, coverage=coverage)
    assert extension.tokenizer.vocabulary.pieces()[letters.vocab_size :] == [*characters]
    assert (extension.characters, extension.words) == (len(characters), 0)
    assert extension.coverage == pytest.approx(reached / 27)


@pytest.mark.parametrize(
    ("room", "coverage", "pieces"),
    [
        (1, 1.0, ["猫"]),
        (3, 1.0, ["猫", "狗", "熊"]),
        # 狗熊猫 saves 3 times 2 tokens, 猫狗 6 times 1: as many, so 狗, the lower, is first.
        (5, 1.0, ["猫", "狗", "熊", "鸟", "狗熊猫"]),
        (6, 1.0, ["猫", "狗", "熊", "鸟", "狗熊猫", "猫狗"]),
        # Words of characters that have no piece are no pieces.
        (3, 0.5, ["猫", "狗", "猫狗"]),
    ],
)
def test_a_size_is_filled_with_characters_and_then_the_words_that_save_most(
    letters, room, coverage, pieces
):
    extension = extend(letters, WORDS, vocab_size=letters.vocab_size + room, coverage=coverage)
    assert extension.tokenizer.vocabulary.pieces()[letters.vocab_size :] == pieces
    characters = sum(len(piece) == 1 for piece in pieces)
    assert (extension.characters, extension.words) == (characters, room - characters)


def test_a_size_smaller_than_the_coverage_wins(letters):
    extension = extend(letters, WORDS, vocab_size=letters.vocab_size + 2, coverage=1.0)
    assert extension.coverage == pytest.approx(22 / 27)


def test_words_of_one_or_more_than_four_characters_are_no_word_pieces(letters):
    words = {"猫狗熊鸟鱼": 0.5, "猫狗熊鸟": 0.25, "鱼": 0.125, "T猫狗": 0.125}
    new = extend(letters, words, vocab_size=letters.vocab_size + 6, coverage=1.0).tokenizer
    assert new.vocabulary.pieces()[letters.vocab_size :] == [*"狗猫熊鸟鱼", "猫狗熊鸟"]
    with pytest.raises(TokenizerError, match="the words have 6 new pieces"):
        extend(letters, words, vocab_size=letters.vocab_size + 7, coverage=1.0)


def test_the_order_of_the_words_does_not_matter(letters):
    backwards = dict(reversed(WORDS.items()))
    size = letters.vocab_size + 6
    first, second = (
        extend(letters, words, vocab_size=size, coverage=1.0).tokenizer
        for words in (WORDS, backwards)
    )
    assert first.fingerprint == second.fingerprint


def test_characters_that_the_base_has_count_as_covered_and_are_not_added_again():
    base = word_pieces("猫")
    extension = extend(base, WORDS, coverage=0.9)
    assert extension.tokenizer.vocabulary.pieces()[base.vocab_size :] == ["狗", "熊"]
    assert extension.coverage == pytest.approx(25 / 27)
    extension = extend(base, {"狗": 0.75, "猫": 0.25}, coverage=0.5)
    assert extension.tokenizer.vocabulary.pieces()[base.vocab_size :] == ["狗"]
    assert extension.coverage == 1


@pytest.mark.slow
def test_traditional_spellings_get_pieces_by_their_share_of_the_text(letters):
    words = with_traditional({"苹果": 0.5, "猫": 0.25, "人": 0.25}, 0.25)
    # Characters: 果 8, 苹 6, 猫 3, 人 4, 蘋 2, 貓 1, of 24. Words: 苹果 6, 蘋果 2.
    new = extend(letters, words, vocab_size=letters.vocab_size + 8, coverage=1.0).tokenizer
    assert new.vocabulary.pieces()[letters.vocab_size :] == [*"果苹人猫蘋貓", "苹果", "蘋果"]
    assert len(new.split(["蘋果貓"])[0]) == len(new.split(["苹果猫"])[0]) == 2


def test_the_context_length_is_the_bases_unless_another_is_asked_for(letters):
    assert extend(letters, WORDS).tokenizer.config == letters.config
    longer = extend(letters, WORDS, context_length=128).tokenizer
    assert longer.config == replace(letters.config, context_length=128)


@pytest.mark.parametrize(
    ("words", "room", "options", "problem"),
    [
        (WORDS, 0, {}, "vocab_size is 96; expected more than the 96 of the base"),
        (WORDS, -86, {}, "vocab_size is 10; expected more than the 96 of the base"),
        (WORDS, 7, {"coverage": 1.0}, "6 new pieces, expected at most 102"),
        (WORDS, 4, {"coverage": 0.5}, "3 new pieces, expected at most 99"),
        (WORDS, None, {"coverage": 0.0}, "coverage is 0.0; expected more than 0, at most 1"),
        (WORDS, None, {"coverage": 1.01}, "coverage is 1.01; expected"),
        (WORDS, None, {"coverage": math.nan}, "coverage is nan; expected"),
        ({}, None, {}, "no Chinese characters in 0 words"),
        ({"cat": 0.5, "ねこ": 0.5}, None, {}, "no Chinese characters in 2 words"),
    ],
    ids=[
        "the base's size", "smaller than the base", "more than the words have",
        "more than the covered characters make", "no coverage", "more than all", "nan", "no words",
        "words without Chinese characters",
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_is_refused(letters, words, room, options, problem):
    assert letters.vocab_size == 96
    size = None if room is None else letters.vocab_size + room
    with pytest.raises(TokenizerError, match=re.escape(problem)):
        extend(letters, words, vocab_size=size, **options)


@pytest.mark.parametrize("coverage", [0.1, 1.0])
def test_a_base_that_has_every_character_is_refused(small, coverage):
    with pytest.raises(TokenizerError, match="has every one of these characters already"):
        extend(small, WORDS, coverage=coverage)


def test_a_base_that_has_every_character_can_get_words(clip, small):
    again = extend(small, {"鸟熊": 0.75, "猫狗": 0.25}, vocab_size=small.vocab_size + 1)
    assert (again.characters, again.words, again.coverage) == (0, 1, 1)
    assert pieces_of(again.tokenizer, "鸟熊猫狗") == ["鸟熊", "猫狗"]
    assert is_extension(again.tokenizer, clip)


# Telling what changed


@pytest.mark.parametrize("name", ["CLIP", "bilingual unigram", "bilingual BPE", "WordPiece"])
def test_texts_that_hold_a_new_piece_are_told_from_those_that_do_not(clip, name):
    old = clip if name == "CLIP" else BASES[name]()
    vocabulary = old.vocabulary.with_pieces([NewPiece("rabbi", 0.5)])
    new = Tokenizer(vocabulary, old.config)
    texts = ["white rabbit", "a rat", "Rabbit", "", "红苹果", "the rabbi's"]
    assert changed(old, new, texts) == ["white rabbit", "Rabbit", "the rabbi's"]
    assert changed(old, old, texts) == []


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ("extended", "base", True),
        ("base", "base", True),
        ("extended twice", "base", True),
        ("longer", "base", True),
        ("base", "extended", False),
        ("extended otherwise", "extended", False),
        ("in another order", "extended", False),
        ("not cleaned", "base", False),
        ("with another end", "base", False),
        ("with another padding", "base", False),
        ("reduced", "base", False),
    ],
)
def test_an_extension_says_every_old_id_as_before(new, old, expected):
    base = word_pieces()
    cat, dog = NewPiece("猪", 0.5), NewPiece("狗", 0.5)
    made = {
        "base": base,
        "extended": Tokenizer(base.vocabulary.with_pieces([cat]), base.config),
        "extended twice": Tokenizer(base.vocabulary.with_pieces([cat, dog]), base.config),
        "extended otherwise": Tokenizer(base.vocabulary.with_pieces([dog]), base.config),
        "in another order": Tokenizer(base.vocabulary.with_pieces([dog, cat]), base.config),
        "longer": Tokenizer(base.vocabulary, replace(base.config, context_length=64)),
        "not cleaned": Tokenizer(base.vocabulary, replace(base.config, cleaning="lower")),
        "with another end": Tokenizer(base.vocabulary, replace(base.config, end_of_text="[CLS]")),
        "with another padding": Tokenizer(base.vocabulary, replace(base.config, padding="[SEP]")),
        "reduced": Tokenizer(base.vocabulary.reduced_to(range(48))[0], base.config),
    }
    assert is_extension(made[new], made[old]) is expected
