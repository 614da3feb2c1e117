"""Words are jieba's where a text is Chinese, and runs of letters and digits elsewhere."""

import sys
import unicodedata

import pytest

from vlm.text.words import HAN, is_han, split_words

EVERY_CHARACTER = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
IDEOGRAPHS = ("CJK UNIFIED IDEOGRAPH-", "CJK COMPATIBILITY IDEOGRAPH-")


def test_han_is_every_ideograph_that_unicode_names_and_nothing_else_that_it_names():
    found = {c for c in HAN.findall(EVERY_CHARACTER) if unicodedata.name(c, "")}
    named = {c for c in EVERY_CHARACTER if unicodedata.name(c, "").startswith(IDEOGRAPHS)}
    assert found == named | {"〇"}


@pytest.mark.parametrize(
    ("first", "last"),
    # The first and last characters of Unicode's Blocks.txt, as far as they are assigned.
    [
        (0x3400, 0x4DBF),
        (0x4E00, 0x9FFF),
        (0xF900, 0xFAD9),
        (0x20000, 0x2A6DF),
        (0x2A700, 0x2B739),
        (0x2B740, 0x2B81D),
        (0x2B820, 0x2CEA1),
        (0x2CEB0, 0x2EBE0),
        (0x2EBF0, 0x2EE5D),
        (0x2F800, 0x2FA1D),
        (0x30000, 0x3134A),
        (0x31350, 0x323AF),
        (0x323B0, 0x33479),
    ],
    ids=["A", "basic", "compatibility", "B", "C", "D", "E", "F", "I", "supplement", "G", "H", "J"],
)
def test_a_block_of_ideographs_is_han_from_its_first_to_its_last(first, last):
    assert all(is_han(chr(point)) for point in range(first, last + 1))


@pytest.mark.parametrize(
    "text", ["", "a", "7", "，", "。", "あ", "カ", "한", "⼈", "㊗", "猫狗", "猫\n"]
)
def test_what_is_not_one_ideograph_is_not_han(text):
    assert not is_han(text)


@pytest.mark.parametrize(
    ("text", "words"),
    # The first two are examples of jieba's own documentation.
    [
        ("我来到北京清华大学", ["我", "来到", "北京", "清华大学"]),
        ("他来到了网易杭研大厦", ["他", "来到", "了", "网易", "杭研", "大厦"]),
        ("一只猫，两只狗。", ["一只", "猫", "两只", "狗"]),
        ("𠮷野家", ["𠮷", "野家"]),
    ],
    ids=["README", "a name that no dictionary has", "punctuation", "beyond the basic plane"],
)
def test_chinese_is_segmented(text, words):
    assert split_words(text) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A cat, on a mat.", ["A", "cat", "on", "a", "mat"]),
        ("don't  the dogs' man’s 'quoted'", ["don't", "the", "dogs", "man’s", "quoted"]),
        ("rock'n'roll isn''t", ["rock'n'roll", "isn", "t"]),
        ("T-shirt snake_case 3D 10,000", ["T", "shirt", "snake", "case", "3D", "10", "000"]),
        ("Café cafe\u0301 Größe", ["Café", "cafe\u0301", "Größe"]),
        ("ＣＤ ２０", ["ＣＤ", "２０"]),
    ],
    ids=["punctuation", "apostrophes", "inner apostrophes", "signs", "accents", "full width"],
)
def test_other_words_are_runs_of_letters_and_digits(text, words):
    assert split_words(text) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("穿T恤的man's狗", ["穿", "T", "恤", "的", "man's", "狗"]),
        ("3只cats", ["3", "只", "cats"]),
        ("猫'猫", ["猫", "猫"]),
    ],
)
def test_both_kinds_may_stand_side_by_side(text, words):
    assert split_words(text) == words


@pytest.mark.parametrize("text", ["", " \n\t\u3000", "…，。！'’_-", "👍🏽 ♥ ½"])
def test_a_text_without_letters_and_digits_has_no_words(text):
    assert split_words(text) == []


def test_no_letter_of_a_text_is_lost():
    text = "一位 old man（65岁）在《New York》的街上, waiting… 等了30分钟！"
    assert "".join(split_words(text)) == "".join(c for c in text if c.isalnum())


def test_text_without_chinese_does_not_load_the_dictionary(monkeypatch):
    monkeypatch.setitem(sys.modules, "rjieba", None)
    assert split_words("a cat") == ["a", "cat"]
    with pytest.raises(ImportError):
        split_words("猫")
