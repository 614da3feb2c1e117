"""The things that emoji show: their groups and families, read from emojibase's tables."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.emoji.captions import captions_of

_LANGUAGE_FOLDERS = {"en": "en", "zh": "zh", "zh-Hant": "zh-hant"}

# Flags that are another country's flag: their image has no single right caption.
_BORROWED_FLAGS = frozenset({"BV", "SJ", "CP", "MF", "HM", "EA", "DG", "UM"})

_VARIATION_SELECTOR = "FE0F"
_REGIONAL_INDICATOR_A, _REGIONAL_INDICATOR_Z = 0x1F1E6, 0x1F1FF

# Code points that tell the members of a family apart.
_FAMILY_MEMBERS = frozenset(
    {
        "200D",  # zero-width joiner
        "2640",  # female sign
        "2642",  # male sign
        "1F468",  # man
        "1F469",  # woman
        "1F9D1",  # person
        "27A1",  # facing right
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Concept:
    """One emoji without skin tones: what several images show and what their captions say."""

    key: str
    """Its code points in hexadecimal, see `concept_key`."""
    text: str
    """The emoji as a string."""
    version: str
    """The version of Unicode's emoji standard that brought it."""
    group: str
    subgroup: str
    captions: Mapping[str, tuple[str, ...]]
    """By language: the name first, then the keywords, no text twice."""
    unicode_name: str
    """The character's name in the Unicode standard; empty where it has none of its own."""


def concept_key(code_points: str) -> str:
    """Return hyphened code points in upper case, four digits at least, no variation selector."""
    parts = (part.upper().zfill(4) for part in code_points.split("-"))
    return "-".join(part for part in parts if part != _VARIATION_SELECTOR)


def family_of(key: str) -> str:
    """Return what all variants of a concept share (woman, man, person, facing right)."""
    members = [part for part in key.split("-") if part not in _FAMILY_MEMBERS]
    return "-".join(members) or "PERSON"


def region_of(key: str) -> str | None:
    """Return the two-letter code of a country's flag, or None for anything else."""
    numbers = [int(part, 16) for part in key.split("-")]
    is_flag = len(numbers) == 2 and all(
        _REGIONAL_INDICATOR_A <= number <= _REGIONAL_INDICATOR_Z for number in numbers
    )
    if not is_flag:
        return None
    return "".join(chr(ord("A") + number - _REGIONAL_INDICATOR_A) for number in numbers)


def read_concepts(
    emojibase: Mapping[str, bytes], keywords: Mapping[str, Sequence[str]]
) -> tuple[Concept, ...]:
    """Read every concept in Unicode order from the files of the package `emojibase-data`.

    `keywords` are further English ones by emoji, without variation selectors. Components (skin
    tones, hair) and flags that are another country's flag are left out.
    """
    tables = {
        language: {
            entry["hexcode"]: entry for entry in json.loads(emojibase[f"{folder}/data.json"])
        }
        for language, folder in _LANGUAGE_FOLDERS.items()
    }
    groups = json.loads(emojibase["meta/groups.json"])
    unicode_names = json.loads(emojibase["meta/unicode-names.json"])
    return tuple(
        Concept(
            key=concept_key(code_points),
            text=entry["emoji"],
            version=f"{entry['version']:.1f}",
            group=groups["groups"][str(entry["group"])],
            subgroup=groups["subgroups"][str(entry["subgroup"])],
            captions=captions_of(
                {language: table[code_points] for language, table in tables.items()},
                keywords.get(entry["emoji"].replace("\ufe0f", ""), ()),
            ),
            unicode_name=unicode_names.get(code_points, ""),
        )
        for code_points, entry in tables["en"].items()
        if _is_concept(entry, groups["groups"])
    )


def _is_concept(entry: Mapping[str, Any], groups: Mapping[str, str]) -> bool:
    if "group" not in entry or groups[str(entry["group"])] == "component":
        return False
    return region_of(concept_key(entry["hexcode"])) not in _BORROWED_FLAGS
