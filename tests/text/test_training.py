"""A tokenizer is trained to the same bytes each time, balances two languages and loses no text."""

import math
import re
from collections import Counter
from pathlib import Path

import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from tests.builders import THING_TEXTS, THINGS, unique_captions
from vlm.errors import TokenizerError
from vlm.text.config import SentencePieceConfig
from vlm.text.tokenizer import Tokenizer
from vlm.text.training import BEGIN_ID, END_ID, PAD_ID, train_sentencepiece
from vlm.text.words import HAN

EMOJI = Path(__file__).parents[2] / "data" / "emoji"
ZH, EN = THING_TEXTS["zh"], THING_TEXTS["en"]
EN_WORDS = [word for text in EN for word in text.split()]
BOTH_KINDS = pytest.mark.parametrize("model_type", ["unigram", "bpe"])


def train(zh=ZH, en=EN, *, word_lists=None, **options) -> Tokenizer:
    config = SentencePieceConfig(**{"vocab_size": 320, "context_length": 64} | options)
    return train_sentencepiece({"zh": zh, "en": en}, config, word_lists=word_lists)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode([text]).ids[0].tolist()


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    pieces = tokenizer.vocabulary.pieces()
    return [pieces[token] for row in tokenizer.split([text]) for token in row]


def learned(tokenizer: Tokenizer) -> set[str]:
    """Return the pieces that are no special ones and no bytes."""
    model = tokenizer.vocabulary.files()["sentencepiece.model"]
    return {piece.piece for piece in ModelProto.FromString(model).pieces if piece.type == 1}


@pytest.fixture(scope="module")
def tokenizer():
    return train()


@pytest.fixture(scope="module")
def captions(emoji):
    split = emoji("train")
    return {language: unique_captions(split, [language]) for language in ("zh", "en")}


# The same bytes


@BOTH_KINDS
def test_training_twice_gives_the_same_bytes(model_type, tmp_path):
    for name in ("first", "second"):
        train(model_type=model_type, temperature=3.0, han_coverage=0.95).save(tmp_path / name)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("first", "second")
    )
    assert {"sentencepiece.model", "vlm_tokenizer.json"} <= set(first)
    assert first == second


def test_other_texts_give_another_tokenizer(tokenizer):
    assert train(en=[*EN, "something else"]).fingerprint != tokenizer.fingerprint


def test_an_iterator_of_texts_is_as_good_as_a_list(tokenizer):
    assert train((text for text in ZH), iter(EN)).fingerprint == tokenizer.fingerprint


def test_repeated_texts_count_as_often_as_they_come(tokenizer):
    in_turn = [text for text in dict.fromkeys(ZH) for _ in range(3)]
    assert train(in_turn).fingerprint == tokenizer.fingerprint
    assert train([*ZH, *["红苹果"] * 50]).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("space", ["\n", "\t", " \u3000 ", "\r\n", "\x0b"])
def test_space_inside_a_text_does_not_split_it(space):
    texts = [f"{en}{space}{zh}" for en, zh in THINGS] * 3
    expected = train(en=[f"{en} {zh}" for en, zh in THINGS] * 3).fingerprint
    assert train(en=texts).fingerprint == expected


# What a trained tokenizer does


def test_special_ids_have_their_fixed_places(tokenizer):
    assert (PAD_ID, BEGIN_ID, END_ID) == (0, 2, 3)
    assert tokenizer.special_ids.padding == PAD_ID
    assert tokenizer.special_ids.end_of_text == END_ID
    assert ids_of(tokenizer, "cat")[0] == BEGIN_ID
    assert ids_of(tokenizer, "cat")[-1] == END_ID


def test_size_and_context_are_those_of_the_configuration(tokenizer):
    assert tokenizer.vocab_size == 320
    assert tokenizer.context_length == 64
    assert SentencePieceConfig().vocab_size == 32_000
    assert SentencePieceConfig().context_length == 77


@BOTH_KINDS
@pytest.mark.parametrize("separate_spaces", [True, False], ids=["separate spaces", "words"])
def test_both_languages_get_pieces_longer_than_bytes(model_type, separate_spaces):
    tokenizer = train(model_type=model_type, separate_spaces=separate_spaces)
    for text in [*ZH, *EN]:
        ids = ids_of(tokenizer, text)[1:-1]
        assert len(ids) <= len(text) + 1  # a Chinese character is three bytes
        assert tokenizer.decode(ids) == text


@BOTH_KINDS
@pytest.mark.parametrize(
    "text", ["🦄", "𠮷野家", "ñandú", "שלום", "龘 and 🏳️‍🌈", "50%", "한국어"],
    ids=["emoji", "rare character", "accents", "Hebrew", "a joined sequence", "digits", "Korean"],
)  # fmt: skip
def test_bytes_carry_characters_that_were_never_seen(model_type, text):
    tokenizer = train(model_type=model_type)
    ids = ids_of(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert 1 not in ids  # the unknown id
    assert tokenizer.special_ids.unknown is None


@pytest.mark.parametrize(
    "text", ["Green Tea", "GREEN TEA", "ｇｒｅｅｎ　ｔｅａ", " green  tea "],
    ids=["capitals", "all capitals", "full width", "spaces"],
)  # fmt: skip
def test_case_width_and_space_share_ids(tokenizer, text):
    assert ids_of(tokenizer, text) == ids_of(tokenizer, "green tea")


@BOTH_KINDS
def test_digits_are_pieces_of_their_own(model_type):
    texts = [*EN, *["the year 2024", "2024 2024年", "b2024b"] * 20]
    tokenizer = train(en=texts, model_type=model_type)
    digits = re.compile(r"\d")
    assert {piece for piece in learned(tokenizer) if digits.search(piece)} == {"0", "2", "4"}
    assert pieces_of(tokenizer, "b2024")[-4:] == ["2", "0", "2", "4"]
    assert tokenizer.decode(ids_of(tokenizer, "2024")) == "2024"


def test_a_word_is_the_same_piece_at_the_start_of_a_word_and_inside_one_if_spaces_are_separate():
    texts = [*EN, *["board", "snowboard", "snow", "board game"] * 20]
    tokenizer = train(en=texts, separate_spaces=True)
    board = ids_of(tokenizer, "board")[-2]
    assert ids_of(tokenizer, "snowboard")[-2] == board
    assert board in ids_of(tokenizer, "a board game")
    assert tokenizer.decode(ids_of(tokenizer, "a board game")) == "a board game"


def test_separate_spaces_have_a_piece_even_if_no_text_has_one():
    tokenizer = train(en=EN_WORDS, separate_spaces=True, vocab_size=320)
    assert pieces_of(tokenizer, "cat")[0] == "▁"
    assert tokenizer.decode(ids_of(tokenizer, "cat sun")) == "cat sun"


@pytest.mark.slow
@pytest.mark.parametrize("separate_spaces", [True, False], ids=["separate spaces", "words"])
def test_common_pieces_are_as_probable_as_they_are_used(captions, separate_spaces):
    """SentencePiece itself counts places that no piece may cross as uses of one of the pieces."""
    tokenizer = train(**captions, vocab_size=4000, separate_spaces=separate_spaces)
    used = Counter(t for texts in captions.values() for row in tokenizer.split(texts) for t in row)
    total = sum(used.values())
    pieces = ModelProto.FromString(tokenizer.vocabulary.files()["sentencepiece.model"]).pieces
    ratio = {
        piece.piece: math.exp(piece.score) * total / used[token]
        for token, piece in enumerate(pieces)
        if piece.type == 1 and used[token] >= 100
    }
    assert len(ratio) > 20
    assert max(ratio.values()) < 2, sorted(ratio.items(), key=lambda item: -item[1])[:5]


def test_a_word_is_one_piece_with_the_space_before_it_otherwise():
    tokenizer = train(en=[*EN, *["board", "snowboard", "snow", "board game"] * 20])
    assert pieces_of(tokenizer, "board game board") == ["▁board", "▁game", "▁board"]


@BOTH_KINDS
@pytest.mark.parametrize("separate_spaces", [True, False], ids=["separate spaces", "words"])
def test_a_chinese_word_is_the_same_piece_at_the_start_of_a_text_and_elsewhere(
    model_type, separate_spaces
):
    zh = [*["熊猫", "熊猫和熊猫", "大熊猫", "一只 熊猫", "a 熊猫", "熊猫 竹子", "竹子"] * 20, *ZH]
    tokenizer = train(zh, separate_spaces=separate_spaces, model_type=model_type)
    assert "熊猫" in learned(tokenizer)
    for text in ("熊猫", "大熊猫", "一只 熊猫", "a 熊猫", "cat熊猫", "（熊猫"):
        assert pieces_of(tokenizer, text)[-1] == "熊猫"
    assert not [piece for piece in learned(tokenizer) if piece[0] == "▁" and HAN.search(piece)]


# Balance


def of_size(texts: list[str], size: int) -> list[str]:
    """Repeat texts until they have so many bytes."""
    made: list[str] = []
    left = size
    while left:
        for text in texts:
            whole = text if len(text.encode()) <= left else "x" * left
            made.append(whole)
            left -= len(whole.encode())
            if not left:
                break
    return made


@pytest.mark.parametrize(
    ("temperature", "times"), [(1.0, 1), (2.0, 8), (1.5, 4), (float("inf"), 64)]
)
def test_languages_count_by_their_bytes_to_the_power_of_one_by_the_temperature(
    captions, temperature, times
):
    """64 times less Chinese counts 64 ** (1 - 1 / temperature) times as often."""
    zh, en = of_size(captions["zh"], 4**5), of_size(captions["en"], 4**8)
    # What byte-pair merges come to does not depend on the unit in which texts are counted.
    options = {"model_type": "bpe", "vocab_size": 700}
    balanced = train(zh, en, temperature=temperature, **options)
    assert balanced.fingerprint == train(zh * times, en, **options).fingerprint
    assert balanced.fingerprint != train(zh * (times + 1), en, **options).fingerprint


@pytest.mark.slow
def test_a_higher_temperature_gives_the_smaller_language_more_pieces(captions):
    zh = captions["zh"][:300]
    en = of_size(captions["en"], 20 * sum(len(text.encode()) for text in zh))
    words = []
    for temperature in (1.0, 2.0, 8.0):
        tokenizer = train(zh, en, temperature=temperature, vocab_size=1400)
        words.append(sum(len(HAN.findall(piece)) > 1 for piece in learned(tokenizer)))
    assert words == sorted(set(words))
    assert words[2] > 2 * words[0]


# Characters


RARE = "龘靐齉爩麤灪鱻籱麣鸜"


@pytest.mark.parametrize(
    ("han_coverage", "latin_coverage", "kept"),
    [(0.9, 1.0, {"ñ"}), (1.0, 0.9, {"龘"}), (1.0, 1.0, {"龘", "ñ"}), (0.9, 0.9, set())],
)
def test_each_script_has_a_coverage_of_its_own(han_coverage, latin_coverage, kept):
    zh = [*["蓝色的大海", "红色的大海", "大海的色"] * 20, "龘色"]
    en = [*["the blue sea", "a blue sea", "the sea"] * 20, "ñu sea"]
    tokenizer = train(
        zh, en, vocab_size=300, model_type="bpe",
        han_coverage=han_coverage, latin_coverage=latin_coverage,
    )  # fmt: skip
    assert {"龘", "ñ"} & learned(tokenizer) == kept
    assert tokenizer.decode(ids_of(tokenizer, "龘色 ñu")) == "龘色 ñu"


@pytest.mark.parametrize(
    ("coverage", "expected"),
    [(0.5, "一二"), (0.7, "一二三"), (0.9, "一二三四"), (1.0, "一二三四五")],
)
def test_the_most_used_characters_are_kept_until_their_share_is_reached(coverage, expected):
    zh = ["一"] * 40 + ["二"] * 22 + ["三"] * 18 + ["四"] * 15 + ["五"] * 5
    pieces = learned(train(zh, model_type="bpe", han_coverage=coverage))
    assert {piece for piece in pieces if HAN.search(piece)} == set(expected)


@BOTH_KINDS
def test_what_stands_around_a_rare_character_does_not_become_a_word(model_type):
    zh = [*(f"海{rare}洋" for rare in RARE for _ in range(3)), *["海的", "洋的"] * 40, *ZH * 3]
    tokenizer = train(zh, han_coverage=0.9, model_type=model_type, vocab_size=314)
    assert not learned(tokenizer) & set(RARE)
    assert pieces_of(tokenizer, "海洋") == ["海", "洋"]
    assert tokenizer.decode(ids_of(tokenizer, f"海{RARE}洋")) == f"海{RARE}洋"


def test_rare_signs_get_no_piece_and_spaces_stay_what_they_are():
    """Spaces are no characters to be covered, however few there are beside the signs."""
    zh = ["一，二，三，四，五，六，七，八，九。"] * 200 + ["一☃"]
    options = {"vocab_size": 300, "model_type": "bpe", "other_coverage": 0.9}
    pieces = learned(train(zh, ["the cat sat on the mat"] * 5, **options))
    assert "☃" not in pieces
    assert "," in pieces  # the comma's normal form
    assert "▁the" in pieces


# Word lists


@BOTH_KINDS
def test_words_of_a_list_become_pieces(model_type):
    # SentencePiece's unigram takes up what occurs in at least two words that differ.
    lists = {
        "zh": {"长颈鹿": 0.4, "斑马": 0.4, "长颈鹿科": 0.1, "斑马线": 0.1},
        "en": {"giraffe": 0.4, "zebra": 0.4, "giraffes": 0.1, "zebras": 0.1},
    }
    words = {"长颈鹿", "斑马", "▁giraffe", "▁zebra"}
    assert not learned(train(model_type=model_type)) & words
    assert learned(train(word_lists=lists, model_type=model_type, vocab_size=336)) >= words


def test_a_list_counts_as_much_as_the_texts_of_its_language():
    """600 bytes of Chinese go with 600 bytes of list: words of six bytes come a hundred times."""
    zh = of_size(["小狗", "绿茶", "热汤"], 600)
    listed = train(zh, word_lists={"zh": {"斑马": 0.75, "绿茶": 0.25}}, vocab_size=300)
    by_hand = train([*zh, *["斑马"] * 75, *["绿茶"] * 25], vocab_size=300)
    assert listed.fingerprint == by_hand.fingerprint
    assert listed.fingerprint != train([*zh, *["斑马"] * 100], vocab_size=300).fingerprint


def test_an_empty_list_changes_nothing(tokenizer):
    assert train(word_lists={"zh": {}, "en": {}}).fingerprint == tokenizer.fingerprint
    assert train(word_lists={}).fingerprint == tokenizer.fingerprint


# What is refused


@pytest.mark.parametrize("texts", [[], [""], [" \n", "\u3000"]], ids=["none", "empty", "blank"])
@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_language_without_text_is_refused(language, texts):
    with pytest.raises(TokenizerError, match=f"no text in '{language}' to train a tokenizer on"):
        train(**{language: texts})


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_language_that_is_left_out_is_refused(language):
    texts = {name: lines for name, lines in THING_TEXTS.items() if name != language}
    with pytest.raises(TokenizerError, match=f"no text in '{language}' .* expected texts in zh"):
        train_sentencepiece(texts, SentencePieceConfig(vocab_size=320))


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ({"zh": ["a cat", "12"]}, "none of the 2 texts in 'zh' has a letter of its script"),
        ({"en": ["猫", "狗", "1"]}, "none of the 3 texts in 'en' has a letter of its script"),
    ],
    ids=["Chinese without Han characters", "English without letters"],
)
def test_texts_in_another_script_are_refused(texts, problem):
    with pytest.raises(TokenizerError, match=problem):
        train(**texts)


def test_one_text_in_the_script_of_its_language_is_enough():
    assert train(zh=[*ZH, "a cat"], en=[*EN, "猫"]).vocab_size == 320


@pytest.mark.parametrize(
    ("texts", "word_lists"),
    [({"ja": ["猫"]}, None), ({}, {"fr": {"chat": 1.0}})],
    ids=["texts", "a word list"],
)
def test_a_third_language_is_refused(texts, word_lists):
    config = SentencePieceConfig(vocab_size=320)
    with pytest.raises(TokenizerError, match=r"texts or words in '(ja|fr)'; expected zh and en"):
        train_sentencepiece(THING_TEXTS | texts, config, word_lists=word_lists)


@BOTH_KINDS
@pytest.mark.parametrize("vocab_size", [0, -1], ids=["zero", "negative"])
def test_a_vocabulary_that_cannot_be_filled_is_refused_with_its_size(vocab_size, model_type, capfd):
    with pytest.raises(TokenizerError, match=rf"a vocabulary of {vocab_size} on 24 texts"):
        train(vocab_size=vocab_size, model_type=model_type)
    assert capfd.readouterr() == ("", "")


@BOTH_KINDS
@pytest.mark.parametrize(
    ("vocab_size", "bound"), [(100_000, "most"), (270, "least")], ids=["too large", "too small"]
)
def test_a_size_that_does_not_fit_the_texts_is_refused_with_the_one_that_does(
    vocab_size, bound, model_type, capfd
):
    with pytest.raises(TokenizerError, match=rf"expected a vocab_size of at {bound}") as error:
        train(vocab_size=vocab_size, model_type=model_type)
    fitting = int(re.search(rf"at {bound} (\d+)", str(error.value))[1])
    train(vocab_size=fitting, model_type=model_type)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"temperature": 0.9}, "temperature is 0.9; expected at least 1"),
        ({"temperature": float("nan")}, "temperature is nan; expected at least 1"),
        ({"han_coverage": 0.0}, "han_coverage is 0.0; expected more than 0, at most 1"),
        ({"latin_coverage": 1.5}, "latin_coverage is 1.5; expected more than 0, at most 1"),
        ({"other_coverage": -0.5}, "other_coverage is -0.5; expected more than 0, at most 1"),
        ({"context_length": 2}, "context_length is 2; expected"),
    ],
    ids=["temperature", "no temperature", "Han", "Latin", "others", "context"],
)
def test_a_setting_that_makes_no_sense_is_refused(options, problem):
    with pytest.raises(TokenizerError, match=problem):
        train(**options)


@BOTH_KINDS
def test_training_prints_nothing(model_type, capfd):
    train(model_type=model_type)
    assert capfd.readouterr() == ("", "")


# Real captions


def test_captions_of_the_training_set_need_fewer_pieces_than_characters(captions):
    texts = {language: lines[:2000] for language, lines in captions.items()}
    tokenizer = train(**texts, vocab_size=3000, temperature=2.0)
    for language, lines in texts.items():
        pieces = sum(map(len, tokenizer.split(lines)))
        assert pieces < sum(map(len, lines)) * {"zh": 0.9, "en": 0.4}[language]
        used = Counter(token for row in tokenizer.split(lines) for token in row)
        bytes_used = sum(n for token, n in used.items() if 4 <= token < 260)
        assert bytes_used < pieces / 100
