"""The names that artists give their files, for the styles that ship no code points."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from tools.emoji.concepts import Concept, concept_key, family_of
from tools.iconify import IconSet, slug


def squash(text: str) -> str:
    """Return a name as a single lower-case word of letters and digits."""
    return slug(text).replace("-", "")


def keys_by_name(
    concepts: Iterable[Concept], tables: Iterable[Mapping[str, str]]
) -> dict[str, str]:
    """Map the hyphened names of concepts to their keys; where names collide the first one counts.

    Args:
        concepts: In Unicode order.
        tables: Of other styles, concept key to icon name; they come before the concepts' own names.
    """
    concepts = tuple(concepts)
    keys: dict[str, str] = {}
    for table in tables:
        for key, name in table.items():
            keys.setdefault(name, key)
    for concept in concepts:
        for name in _names_of(concept):
            keys.setdefault(name, concept.key)
    known = {concept.key for concept in concepts}
    return {name: key for name, key in keys.items() if key in known}


def keys_by_squashed_name(concepts: Iterable[Concept]) -> dict[str, str]:
    """Map the names of concepts, written as one word, to their keys; shared names are left out."""
    keys: defaultdict[str, set[str]] = defaultdict(set)
    for concept in concepts:
        for name in filter(None, (concept.unicode_name, concept.captions["en"][0])):
            keys[squash(name)].add(concept.key)
    return {name: owners.pop() for name, owners in keys.items() if len(owners) == 1}


def names_by_key(icons: IconSet) -> dict[str, str]:
    """Map the keys of concepts to the names of their icons, by the set's code points."""
    return {concept_key(points): name for points, name in icons.name_by_code_points.items()}


def match_names(icons: IconSet, key_by_name: Mapping[str, str]) -> dict[str, str]:
    """Find the icon name of each concept through the names that concepts go by.

    A drawing that concepts of different families claim is trusted for none of them: the name
    "cricket" may be the insect or the game.

    Returns:
        Concept key to icon name.
    """
    matches: dict[str, str] = {}
    for name in (*icons.icons, *icons.aliases):
        if name in key_by_name:
            matches.setdefault(key_by_name[name], name)
    claims: defaultdict[str, set[str]] = defaultdict(set)
    for key, name in matches.items():
        claims[icons.drawing_of(name)].add(family_of(key))
    return {key: name for key, name in matches.items() if len(claims[icons.drawing_of(name)]) == 1}


def _names_of(concept: Concept) -> Iterator[str]:
    name = concept.captions["en"][0]
    yield slug(name)
    if concept.unicode_name:
        yield slug(concept.unicode_name)
    if country := re.match(r"flag: (.*)", name):
        yield f"flag-for-{slug(country[1])}"
        yield f"flag-for-flag-{slug(country[1])}"
    if digit := re.match(r"keycap: (\d)", name):
        yield f"keycap-{digit[1]}"  # "digit-one" and so on are bare figures, white on nothing
