"""Artists' file names are matched to concepts, and never to two of them."""

import json

import pytest

from tools.emoji.names import (
    keys_by_name,
    keys_by_squashed_name,
    match_names,
    names_by_key,
    squash,
)
from tools.iconify import IconSet, slug


@pytest.fixture
def make_icons():
    """Return a function that makes an icon set from names and aliases (alias to parent)."""

    def make(*names, aliases=None, chars=None):
        icons = {
            "icons": {name: {"body": f"<!-- {name} -->"} for name in names},
            "aliases": {alias: {"parent": parent} for alias, parent in (aliases or {}).items()},
            "width": 16,
            "height": 16,
        }
        return IconSet.read(
            {
                "icons.json": json.dumps(icons).encode(),
                "chars.json": json.dumps(chars or {}).encode(),
            }
        )

    return make


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flag: Côte d’Ivoire", "flag-cote-divoire"),
        ("Antigua & Barbuda", "antigua-and-barbuda"),
        ("twelve o'clock", "twelve-oclock"),
        ("A button (blood type)", "a-button-blood-type"),
    ],
)
def test_slugs_are_ascii_words_joined_by_hyphens(text, expected):
    assert slug(text) == expected


def test_squashed_names_are_one_word():
    assert squash("ROLLED-UP newspaper") == "rolledupnewspaper"


def test_concepts_go_by_their_caption_and_their_unicode_name(make_concept):
    star = make_concept("2B50", name="star", unicode_name="WHITE MEDIUM STAR")
    assert keys_by_name([star], tables=()) == {"star": "2B50", "white-medium-star": "2B50"}


@pytest.mark.parametrize(
    ("caption", "name"), [("flag: China", "flag-for-china"), ("keycap: 3", "keycap-3")]
)
def test_flags_and_keycaps_go_by_the_names_of_older_sets(make_concept, caption, name):
    assert keys_by_name([make_concept("1F600", name=caption)], tables=())[name] == "1F600"


def test_names_of_other_styles_come_first(make_concept):
    concepts = [make_concept("1F997", name="cricket"), make_concept("1F3CF", name="cricket game")]
    names = keys_by_name(concepts, tables=[{"1F3CF": "cricket", "ABCD": "unknown"}])
    assert names == {"cricket": "1F3CF", "cricket-game": "1F3CF"}


def test_a_squashed_name_that_two_concepts_share_is_left_out(make_concept):
    concepts = [
        make_concept("1F300", name="post office"),
        make_concept("1F301", name="postoffice"),
        make_concept("1F302", name="bank"),
    ]
    assert keys_by_squashed_name(concepts) == {"bank": "1F302"}


def test_icons_are_matched_by_name_and_alias(make_icons):
    icons = make_icons("sun", "moon-face", aliases={"moon": "moon-face"})
    assert match_names(icons, {"sun": "2600", "moon": "1F319"}) == {"2600": "sun", "1F319": "moon"}


def test_a_drawing_that_two_families_claim_is_trusted_for_neither(make_icons):
    icons = make_icons("cricket", "sun", aliases={"cricket-game": "cricket"})
    keys = {"cricket": "1F997", "cricket-game": "1F3CF", "sun": "2600"}
    assert match_names(icons, keys) == {"2600": "sun"}


def test_a_drawing_that_one_family_shares_is_trusted(make_icons):
    icons = make_icons("astronaut", aliases={"man-astronaut": "astronaut"})
    keys = {"astronaut": "1F9D1-200D-1F680", "man-astronaut": "1F468-200D-1F680"}
    assert set(match_names(icons, keys)) == set(keys.values())


def test_code_points_of_an_icon_set_become_keys(make_icons):
    icons = make_icons("sun", chars={"2600-fe0f": "sun"})
    assert names_by_key(icons) == {"2600": "sun"}
