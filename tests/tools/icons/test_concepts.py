"""Concepts have one name in each language, and every icon of our categories is decided."""

import json

import pytest

from tools.icons import concepts
from tools.icons.concepts import read_concepts, read_groups, read_table
from vlm.errors import DataError

TABLES = {
    "selection.yaml": {
        "categories": ["Animals"],
        "new": ["dog"],
        "left_out": {"a brand": ["pokeball"]},
    },
    "keywords.yaml": {
        "translations": {"动物": "animal", "鸟": "bird", "宠物": "pet", "飞鸟": "bird"},
        "unfit": {"dog": ["鸟"]},
    },
}
GROUP = concepts.Group(
    key="animals",
    names={"en": "animals", "zh": "动物"},
    concepts={
        "dog": {"zh": "狗", "icons": ["dog", "dog-one"]},
        "St. Bernard": {"zh": "圣伯纳犬", "icons": ["bernard"]},
    },
)


def icon(name, *tags, category="Animals"):
    return {"name": name, "category": category, "tag": list(tags)}


ICONS = (
    icon("dog", "动物", "鸟", "可爱"),
    icon("dog-one", "宠物、动物", "狗"),
    icon("bernard", "鸟", "飞鸟", category="Brand"),
    icon("pokeball"),
    icon("arrow", category="Arrows"),
)


@pytest.fixture
def tables(monkeypatch):
    """Replace the tables of the project by small ones."""
    monkeypatch.setattr(concepts, "read_groups", lambda: (GROUP,))
    monkeypatch.setattr(concepts, "read_table", TABLES.get)


def read(*icons):
    return read_concepts(json.dumps(icons).encode())


@pytest.mark.usefixtures("tables")
def test_a_concept_has_the_names_of_the_table_and_the_fitting_tags_of_all_its_icons():
    dog, bernard = read(*ICONS)
    assert (dog.key, dog.group, dog.icons, dog.is_new) == (
        "dog",
        "animals",
        ("dog", "dog-one"),
        True,
    )
    assert dog.captions == {"en": ("dog", "animal", "pet"), "zh": ("狗", "动物", "宠物")}
    assert (bernard.key, bernard.is_new) == ("st-bernard", False)
    assert bernard.captions == {"en": ("St. Bernard", "bird"), "zh": ("圣伯纳犬", "鸟", "飞鸟")}


@pytest.mark.usefixtures("tables")
def test_an_icon_of_our_categories_in_no_table_is_named():
    with pytest.raises(DataError, match="the icon 'cat' is in no table"):
        read(*ICONS, icon("cat"))


@pytest.mark.usefixtures("tables")
def test_an_icon_that_the_package_lacks_is_named():
    with pytest.raises(DataError, match="'dog-one' of tools/icons is not in the package"):
        read(*(entry for entry in ICONS if entry["name"] != "dog-one"))


@pytest.mark.usefixtures("tables")
def test_an_icon_in_two_tables_is_named(monkeypatch):
    monkeypatch.setitem(TABLES["selection.yaml"]["left_out"], "twice", ["dog"])
    with pytest.raises(DataError, match="'dog' is in two tables"):
        read(*ICONS)


def test_names_are_translations_one_to_one():
    pairs = [
        (name, entry["zh"]) for group in read_groups() for name, entry in group.concepts.items()
    ]
    assert len({english.lower() for english, _ in pairs}) == len(pairs)
    assert len({chinese for _, chinese in pairs}) == len(pairs)


def test_the_other_tables_speak_of_concepts_and_keywords_that_exist():
    names = {name for group in read_groups() for name in group.concepts}
    keywords = read_table("keywords.yaml")
    assert set(read_table("selection.yaml")["new"]) <= names
    assert set(keywords["unfit"]) <= names
    assert {word for words in keywords["unfit"].values() for word in words} <= set(
        keywords["translations"]
    )


def test_names_and_keywords_are_in_their_language():
    pairs = [(group.names["en"], group.names["zh"]) for group in read_groups()]
    for group in read_groups():
        pairs += [(name, entry["zh"]) for name, entry in group.concepts.items()]
    pairs += [(en, zh) for zh, en in read_table("keywords.yaml")["translations"].items()]
    for english, chinese in pairs:
        assert english.isascii(), english
        assert any("\u4e00" <= letter <= "\u9fff" for letter in chinese), chinese
