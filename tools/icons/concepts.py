"""What the icons show: names in both languages, and keywords from the tags of the designers."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from tools.iconify import slug
from vlm.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Concept:
    """One thing that one or several icons show."""

    key: str
    """Its English name in lower case, with hyphens."""
    group: str
    captions: Mapping[str, tuple[str, ...]]
    """By language: the name first, then the keywords, no text twice."""
    icons: tuple[str, ...]
    """IconPark's names of the icons that show it."""
    is_new: bool
    """Whether no training image may show it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A group of concepts, as its table in the folder `groups` has it."""

    key: str
    names: Mapping[str, str]
    """By language."""
    concepts: Mapping[str, Mapping[str, Any]]
    """By English name: the Chinese name as `zh`, and the `icons`."""


@cache
def read_groups() -> tuple[Group, ...]:
    """Read the tables of all groups, in the order of their keys."""
    folder = resources.files("tools.icons").joinpath("groups")
    tables = {
        file.name.removesuffix(".yaml"): yaml.safe_load(file.read_text(encoding="utf-8"))
        for file in folder.iterdir()
    }
    return tuple(
        Group(key=key, names={"en": table["en"], "zh": table["zh"]}, concepts=table["concepts"])
        for key, table in sorted(tables.items())
    )


def read_concepts(icon_park: bytes) -> tuple[Concept, ...]:
    """Read every concept.

    Args:
        icon_park: The file `icons.json` of the package `@icon-park/svg`.

    Raises:
        DataError: an icon is in no table or in two, or in a table but not in the package.
    """
    icons = {icon["name"]: icon for icon in json.loads(icon_park)}
    selection = read_table("selection.yaml")
    _require_decided(icons, selection)
    keywords = read_table("keywords.yaml")
    return tuple(
        Concept(
            key=slug(name),
            group=group.key,
            captions=_captions(
                name,
                entry["zh"],
                tags=(tag for icon in entry["icons"] for tag in icons[icon]["tag"]),
                translations=keywords["translations"],
                unfit=keywords["unfit"].get(name, ()),
            ),
            icons=tuple(entry["icons"]),
            is_new=name in selection["new"],
        )
        for group in read_groups()
        for name, entry in group.concepts.items()
    )


def read_table(name: str) -> dict[str, Any]:
    """Read one of the tables beside this file."""
    text = resources.files("tools.icons").joinpath(name).read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table


def _require_decided(icons: Mapping[str, Mapping[str, Any]], selection: Mapping[str, Any]) -> None:
    """Check that every icon of our categories is once in a table: of a concept, or as left out."""
    decided: set[str] = set()
    for icon in (*_taken(), *(icon for left in selection["left_out"].values() for icon in left)):
        if icon in decided:
            raise DataError(f"the icon {icon!r} is in two tables of tools/icons; expected one")
        if icon not in icons:
            raise DataError(f"the icon {icon!r} of tools/icons is not in the package")
        decided.add(icon)
    for name, icon in icons.items():
        if icon["category"] in selection["categories"] and name not in decided:
            raise DataError(
                f"the icon {name!r} is in no table of tools/icons; expected it in groups/ or "
                "among those left out"
            )


def _taken() -> Iterator[str]:
    for group in read_groups():
        for entry in group.concepts.values():
            yield from entry["icons"]


def _captions(
    english: str,
    chinese: str,
    *,
    tags: Iterable[str],
    translations: Mapping[str, str],
    unfit: Iterable[str],
) -> dict[str, tuple[str, ...]]:
    """Return the captions by language: the names, then the fitting tags and their translations."""
    words = (word.strip() for tag in tags for word in tag.replace(",", "、").split("、"))
    fitting = [word for word in words if word in translations and word not in unfit]
    return {
        "en": tuple(dict.fromkeys((english, *(translations[word] for word in fitting)))),
        "zh": tuple(dict.fromkeys((chinese, *fitting))),
    }
