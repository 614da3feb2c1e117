"""CLIP's cleaning is open_clip's to the character, GLM's blanks are those that GLM publishes."""

import random
import re
import sys
import unicodedata

import pytest
from open_clip.tokenizer import (
    _clean_canonicalize,
    _clean_lower as open_clips_cleaning,
    _clean_whitespace,
)

from vlm.text.cleaning import (
    _PLAIN,
    CLEANING,
    RESTORING,
    clean_clip,
    mark_spaces,
    restore_spaces,
    space_words,
)

CHARACTERS = [chr(point) for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000]
PLAIN = [character for character in CHARACTERS if _PLAIN.fullmatch(character)]
NASTY = (
    "&amp;", "&amp;amp;", "&lt;b&gt;", "&nbsp;", "&EACUTE;", "&#x4E2D;", "&#39", "&bogus;", "&",
    "Ã©", "â€™", "â€œ", "ï¼Œ", "Â\xa0", "ä¸\xad", "’", "“", "ﬁ", "\x1b[31m", "\x00", "\x85",
    "\u2028", "\u200b", "\ufeff", "\ufffd", "\u0301", "e\u0301", "ｶﾞ", "＆", "ａ", "　", " ", "\t",
    "\r\n", "İ", "ẞ", "Σ", "猫", "，", "。", "!", "A", "z", "\ud83d\ude00", "\ud800", "😀", "한",
)  # fmt: skip


def differing(texts):
    """Return the texts that the two clean otherwise, at most ten."""
    return [text for text in texts if clean_clip(text) != open_clips_cleaning(text)][:10]


def test_the_short_way_takes_english_and_chinese():
    taken = 'A photo of 2 cats: "it\'s" [x] ~ 一只猫，坐在《垫子》上。　（Ｃ）'
    assert _PLAIN.fullmatch(taken)
    assert len(PLAIN) > 27_000
    assert not _PLAIN.search("&", 0).group()
    for character in "&＆é’…·\n\t\x7f\xa0\u200b😀":
        assert not _PLAIN.fullmatch(character)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_every_character_of_the_short_way_is_cleaned_as_open_clip_does():
    assert not differing(PLAIN)
    assert not differing(f"a{character}B {character}{character}" for character in PLAIN)


def test_mixtures_of_the_short_way_are_cleaned_as_open_clip_does():
    pick = random.Random(0)
    few = [c for c in PLAIN if unicodedata.category(c) != "Lo"] + list("龥一㐀䶿鿿")
    assert not differing("".join(pick.choices(few, k=pick.randrange(24))) for _ in range(8000))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_every_other_character_is_cleaned_as_open_clip_does():
    assigned = [c for c in CHARACTERS if unicodedata.category(c) not in ("Cn", "Co", "Lo")]
    assert not differing(f"a{character}B {character}" for character in assigned)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_what_is_damaged_is_mended_as_open_clip_does():
    pick = random.Random(0)
    texts = ["".join(pick.choices(NASTY, k=pick.randrange(1, 9))) for _ in range(6000)]
    assert sum(clean_clip(text) != " ".join(text.split()).lower() for text in texts) > 3000
    assert not differing(texts)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("", ""),
        ("  A \t B\n", "a b"),
        ("Ｃａｔ，　１２", "cat, 12"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("cafÃ© â€œno\u00a0onâ€\x9d", 'café "no on"'),
        ("红苹果。", "红苹果。"),
    ],
    ids=["empty", "space and case", "width", "entities", "mended", "Chinese"],
)
def test_a_text_is_cleaned(text, cleaned):
    assert clean_clip(text) == CLEANING["clip"](text) == cleaned


@pytest.mark.parametrize("text", [" A ", "&amp;", "ＡÉ ẞ"])
def test_plain_cleanings_do_what_their_name_says(text):
    assert CLEANING["none"](text) == text
    assert CLEANING["lower"](text) == text.lower()


def blanks_of_glm(text: str) -> str:
    """Replace the longest runs first, as ChatGLM publishes it (`_encode_whitespaces`)."""
    for length in range(10, 1, -1):
        text = text.replace(" " * length, f"<|blank_{length}|>")
    return text


@pytest.mark.parametrize("length", range(34))
def test_spaces_become_the_longest_blanks_first(length):
    text = f"a{' ' * length}b{' ' * length}"
    assert mark_spaces(text) == CLEANING["glm"](text) == blanks_of_glm(text)
    assert restore_spaces(mark_spaces(text)) == text


def test_only_spaces_become_blanks():
    text = "a\u3000\u3000b\t\tc\xa0\xa0d\n\n"
    assert mark_spaces(text) == text


def test_a_restored_text_is_the_one_that_was_marked():
    pick = random.Random(0)
    for _ in range(500):
        text = "".join(pick.choices(["a", "猫", " ", "  ", " " * 9, "<|blank_1|>", "|>"], k=8))
        assert RESTORING["glm"](mark_spaces(text)) == text
    assert not re.search(r"<\|blank_", restore_spaces("<|blank_2|><|blank_10|>"))
    assert restore_spaces("<|blank_11|><|blank_0|>") == "<|blank_11|><|blank_0|>"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("cat", " cat"),
        (" a \t cat\n", " a cat"),
        ("红苹果", "红苹果"),
        (" 红苹果　and  a cat", "红苹果 and a cat"),
        ("T恤", " T恤"),
        ("，红", " ，红"),
        ("😀", " 😀"),
        ("", ""),
        (" \u3000\n", ""),
    ],
    ids=["a word", "spaces", "Chinese", "mixed", "a letter first", "a comma first", "emoji",
         "empty", "blank"],
)  # fmt: skip
def test_a_word_has_a_space_before_it_and_chinese_has_none(text, cleaned):
    assert space_words(text) == CLEANING["words"](text) == cleaned
    assert space_words(cleaned) == cleaned
    assert RESTORING["words"](cleaned) == " ".join(text.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "theirs"), [("whitespace", _clean_whitespace), ("canonicalize", _clean_canonicalize)]
)
def test_cleanings_for_tokenizers_of_transformers_are_open_clips(name, theirs):
    pick = random.Random(1)
    parts = (*NASTY, *"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "A cat", " 一只猫 ")
    texts = ["".join(pick.choices(parts, k=pick.randrange(12))) for _ in range(4000)]
    texts += [f"a{character}B_{character}." for character in PLAIN[::7]]
    assert [text for text in texts if CLEANING[name](text) != theirs(text)] == []


def test_a_canonical_text_has_no_ascii_punctuation_and_no_capitals():
    assert (
        CLEANING["canonicalize"]("A snake_case, “Cat”!  一只猫，&amp;") == "a snake case cat 一只猫"
    )
