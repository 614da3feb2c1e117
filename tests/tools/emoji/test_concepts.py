"""Concepts are read from emojibase's tables with clean captions, families and classes."""

import json

import pytest

from tools.emoji.captions import read_keywords
from tools.emoji.classes import class_table
from tools.emoji.concepts import concept_key, family_of, read_concepts, region_of

FACE, COMPONENT, FLAG = 0, 1, 2


def emojibase(*entries):
    """Return the files of a small `emojibase-data`; an entry is (code points, group, texts)."""
    table = [
        {
            "hexcode": code_points,
            "emoji": "".join(chr(int(part, 16)) for part in code_points.split("-")),
            "version": 0.6,
            "group": group,
            "subgroup": 0,
            "label": label,
            "tags": tags,
        }
        for code_points, group, label, *tags in entries
    ]
    groups = {
        "groups": {"0": "smileys-emotion", "1": "component", "2": "flags"},
        "subgroups": {"0": "face-smiling"},
    }
    files = {f"{language}/data.json": table for language in ("en", "zh", "zh-hant")}
    files |= {"meta/groups.json": groups, "meta/unicode-names.json": {"1F600": "GRINNING FACE"}}
    return {name: json.dumps(content).encode() for name, content in files.items()}


def test_a_concept_has_captions_in_every_language():
    (concept,) = read_concepts(emojibase(("1F600", FACE, "grinning face", "happy")), {})
    assert concept.key == "1F600"
    assert concept.text == "😀"
    assert concept.version == "0.6"
    assert (concept.group, concept.subgroup) == ("smileys-emotion", "face-smiling")
    assert concept.unicode_name == "GRINNING FACE"
    expected = ("grinning face", "happy")
    assert concept.captions == {"en": expected, "zh": expected, "zh-Hant": expected}


def test_keywords_are_stripped_distinct_and_never_the_name():
    texts = (" sun ", "star", "sun", " star", "", "day")
    (concept,) = read_concepts(emojibase(("2600", FACE, *texts)), {})
    assert concept.captions["en"] == ("sun", "star", "day")


def test_further_keywords_are_found_by_the_emoji():
    clock = emojibase(("23F0-FE0F", FACE, "alarm clock"))
    keywords = read_keywords({"dist/emoji-en-US.json": json.dumps({"\u23f0": ["wake"]}).encode()})
    (concept,) = read_concepts(clock, keywords)
    assert concept.captions["en"] == ("alarm clock", "wake")


def test_components_and_borrowed_flags_are_no_concepts():
    norway, svalbard, skin = "1F1F3-1F1F4", "1F1F8-1F1EF", "1F3FB"
    concepts = read_concepts(
        emojibase(
            (skin, COMPONENT, "light skin tone"),
            (norway, FLAG, "flag: Norway"),
            (svalbard, FLAG, "flag: Svalbard & Jan Mayen"),
        ),
        {},
    )
    assert [concept.key for concept in concepts] == [norway]


@pytest.mark.parametrize(
    ("code_points", "key"),
    [("a9", "00A9"), ("263A-FE0F", "263A"), ("1f441-fe0f-200d-1f5e8-fe0f", "1F441-200D-1F5E8")],
)
def test_keys_are_upper_case_without_variation_selectors(code_points, key):
    assert concept_key(code_points) == key


@pytest.mark.parametrize(
    "variants",
    [
        pytest.param(["1F468-200D-1F680", "1F469-200D-1F680", "1F9D1-200D-1F680"], id="astronaut"),
        pytest.param(["1F6B6", "1F6B6-200D-2640", "1F6B6-200D-27A1"], id="walking"),
        pytest.param(["1F468", "1F469", "1F9D1"], id="man, woman, person"),
    ],
)
def test_variants_of_a_concept_share_a_family(variants):
    assert len({family_of(key) for key in variants}) == 1


def test_different_things_are_different_families():
    assert family_of("1F680") != family_of("1F6B6")


@pytest.mark.parametrize(
    ("key", "region"), [("1F1E8-1F1F3", "CN"), ("1F3C1", None), ("1F600-1F600", None)]
)
def test_only_pairs_of_regional_indicators_name_a_country(key, region):
    assert region_of(key) == region


def test_the_class_table_names_every_class_in_both_languages():
    table = class_table()
    assert (len(table.groups), len(table.classes)) == (9, 59)
    for names in (*table.groups.values(), *table.classes.values()):
        assert set(names) == {"en", "zh"}
        assert all(names.values())


def test_every_class_has_a_subgroup_and_a_name_of_its_own():
    table = class_table()
    assert set(table.class_of_subgroup.values()) == set(table.classes)
    for language in ("en", "zh"):
        assert len({names[language] for names in table.classes.values()}) == len(table.classes)
