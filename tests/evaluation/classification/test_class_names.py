"""Class names are read from the files that data sets have, in one language or several."""

import json

import pytest

from vlm.errors import DataError
from vlm.evaluation.classification.prompts import read_class_names


def write(path, content):
    path.write_text(
        content if isinstance(content, str) else json.dumps(content, ensure_ascii=False),
        encoding="utf-8",
    )
    return str(path)


def test_names_by_class_and_language(tmp_path):
    record = {
        "n2": {"zh": "狗；犬", "en": ["dog", "hound"]},
        "n1": {"zh": "猫", "en": "cat; kitty"},
    }
    for suffix in ("json", "yaml"):
        classes = read_class_names([write(tmp_path / f"names.{suffix}", record)], ["en", "zh"])
        assert classes.ids == ("n2", "n1")
        assert classes.names == {
            "en": [("dog", "hound"), ("cat", "kitty")],
            "zh": [("狗", "犬"), ("猫",)],
        }


def test_names_of_one_language_by_class(tmp_path):
    path = write(tmp_path / "names.json", {"a": "cat", "b": ["dog", "hound; whelp"]})
    assert read_class_names([path], ["en"]).names == {"en": [("cat",), ("dog", "hound", "whelp")]}


def test_names_a_line_are_in_the_order_of_the_folders(tmp_path):
    path = write(tmp_path / "names.txt", "cat, wild\n狗;犬\n\n")
    classes = read_class_names([path], ["en"], folders=["n1", "n2"])
    assert classes.ids == ("n1", "n2")
    # A comma, and a semicolon without a space, are parts of a name.
    assert classes.names["en"] == [("cat, wild",), ("狗;犬",)]


def test_lines_end_with_a_line_feed_alone(tmp_path):
    path = write(tmp_path / "names.txt", "a\u2028cat\r\na dog\x0c\n\n")
    classes = read_class_names([path], ["en"], folders=["n1", "n2"])
    assert classes.names["en"] == [("a\u2028cat",), ("a dog",)]


def test_a_list_in_json_is_like_lines(tmp_path):
    path = write(tmp_path / "names.json", ["cat", ["dog", "hound"]])
    classes = read_class_names([path], ["en"], folders=["n1", "n2"])
    assert classes.names["en"] == [("cat",), ("dog", "hound")]


def test_a_file_for_each_language(tmp_path):
    sources = [
        "zh=" + write(tmp_path / "zh.txt", "猫\n狗\n"),
        "en=" + write(tmp_path / "en.txt", "cat\ndog\n"),
    ]
    classes = read_class_names(sources, ["en", "zh"], folders=["a", "b"])
    assert classes.names == {"en": [("cat",), ("dog",)], "zh": [("猫",), ("狗",)]}


@pytest.mark.parametrize(("label", "ids"), [("group", ("g",)), ("class", ("c", "d"))])
def test_the_label_chooses_the_table(tmp_path, label, ids):
    tables = {"groups": {"g": {"en": "x"}}, "classes": {"c": {"en": "y"}, "d": {"en": "z"}}}
    path = write(tmp_path / "classes.json", tables)
    assert read_class_names([path], ["en"], label=label).ids == ids


@pytest.mark.parametrize(("label", "count"), [("group", 9), ("class", 59)])
def test_the_emoji_set_has_names_in_both_languages(label, count):
    classes = read_class_names(["data/emoji/classes.json"], ["zh", "en"], label=label)
    assert {len(names) for names in classes.names.values()} == {count} == {len(classes.ids)}


def test_a_label_without_a_table_is_refused():
    with pytest.raises(
        DataError, match="has tables of groups and classes; expected one for the label"
    ):
        read_class_names(["data/emoji/classes.json"], ["en"], label="colour")


FOLDERS = ["n1", "n2"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "cat\n", "is a list of 1 names; expected 2, one for each class folder"),
        ("a.json", {"n1": "cat"}, "has no name for 1 of the class folders: n2"),
        (
            "a.json",
            {"n1": "cat", "n2": ""},
            "the class 'n2' in .* has the name ''; expected a string",
        ),
        ("a.json", {"n1": "cat", "n2": []}, r"has the name \[\]; expected a string or a list"),
        ("a.json", {"n1": "cat", "n2": 3}, "has the name 3; expected a string or a list"),
        (
            "a.json",
            {"n1": {"zh": "猫"}, "n2": "x"},
            "'n1' in .* has no name in 'en'; its languages are zh",
        ),
        ("a.json", {}, "has no names by class"),
        ("a.json", "3", "has neither names by class nor a list"),
        ("a.json", "{", "cannot read the class names"),
        ("a.yaml", '{\n"a": [', r"cannot read the class names \S*a\.yaml: [^\n]+$"),
        ("a.txt", "cat\n\ndog\n", "is a list of 3 names"),
    ],
)
def test_a_file_that_lacks_names_is_refused(tmp_path, name, content, said):
    with pytest.raises(DataError, match=said):
        read_class_names([write(tmp_path / name, content)], ["en"], folders=FOLDERS)


@pytest.mark.parametrize("letter", ["\u2028", "\x85", "\x0c", "\x1e"])
def test_only_line_feeds_separate_names(tmp_path, letter):
    path = tmp_path / "a.txt"
    path.write_bytes(f"cat{letter}fish\r\ndog\n".encode())
    names = read_class_names([str(path)], ["en"], folders=FOLDERS).names["en"]
    assert names == [(f"cat{letter}fish",), ("dog",)]


def test_names_in_one_language_do_not_serve_two(tmp_path):
    path = write(tmp_path / "a.txt", "cat\ndog\n")
    with pytest.raises(DataError, match="has names in one language; name it with --languages"):
        read_class_names([path], ["zh", "en"], folders=FOLDERS)


def test_lines_do_not_serve_labels(tmp_path):
    path = write(tmp_path / "a.txt", "cat\ndog\n")
    with pytest.raises(DataError, match="is a list of names; expected names by label"):
        read_class_names([path], ["en"], label="class")


def test_files_for_other_languages_are_refused(tmp_path):
    path = write(tmp_path / "a.txt", "cat\ndog\n")
    for sources in ([f"zh={path}"], [path, path], [f"en={path}", f"en={path}"]):
        with pytest.raises(DataError, match="expected one file, or en=FILE zh=FILE"):
            read_class_names(sources, ["en", "zh"], folders=FOLDERS)


def test_files_with_other_classes_are_refused(tmp_path):
    sources = [
        "en=" + write(tmp_path / "en.json", {"n1": "cat", "n2": "dog"}),
        "zh=" + write(tmp_path / "zh.json", {"n2": "狗", "n1": "猫"}),
    ]
    with pytest.raises(DataError, match=r"zh\.json has other classes, or another order, than "):
        read_class_names(sources, ["en", "zh"])


def test_a_missing_file_is_named(tmp_path):
    gone = tmp_path / "gone.txt"
    with pytest.raises(DataError) as raised:
        read_class_names([str(gone)], ["en"])
    assert str(raised.value) == f"cannot read the class names {gone}: No such file or directory"
