"""Icon sets of the Iconify project: drawings of a style as SVG, by name or code point."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tools.emoji.concepts import concept_key, family_of


@dataclass(frozen=True, kw_only=True, slots=True)
class IconSet:
    """One style's drawings by name; some names are aliases of others."""

    icons: Mapping[str, Mapping[str, Any]]
    aliases: Mapping[str, Mapping[str, Any]]
    width: int
    height: int
    name_by_key: Mapping[str, str]
    """Concept key to icon name; empty in the older sets, whose icons have names only."""

    @classmethod
    def read(cls, package: Mapping[str, bytes]) -> "IconSet":
        """Read the set from the files of its package."""
        icons = json.loads(package["icons.json"])
        names = json.loads(package["chars.json"])
        return cls(
            icons=icons["icons"],
            aliases=icons.get("aliases", {}),
            width=icons["width"],
            height=icons["height"],
            name_by_key={concept_key(code_points): name for code_points, name in names.items()},
        )

    def svg(self, name: str) -> str | None:
        """Return the drawing of a name, or None where the set has no faithful one.

        That is an alias that is turned or mirrored, and a drawing whose colors were in a style
        sheet that the set left behind.
        """
        if name in self.aliases and set(self.aliases[name]) != {"parent"}:
            return None
        icon = self.icons[self._drawing_of(name)]
        if 'class="' in icon["body"]:
            return None
        width, height = icon.get("width", self.width), icon.get("height", self.height)
        left, top = icon.get("left", 0), icon.get("top", 0)
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">'
            f"{icon['body']}</svg>"
        )

    def match_names(self, key_by_name: Mapping[str, str]) -> dict[str, str]:
        """Find the icon name of each concept through the names that concepts go by.

        A drawing that concepts of different families claim is trusted for none of them: the name
        "cricket" may be the insect or the game.

        Returns:
            Concept key to icon name.
        """
        matches: dict[str, str] = {}
        for name in (*self.icons, *self.aliases):
            if name in key_by_name:
                matches.setdefault(key_by_name[name], name)
        claims: defaultdict[str, set[str]] = defaultdict(set)
        for key, name in matches.items():
            claims[self._drawing_of(name)].add(family_of(key))
        return {
            key: name for key, name in matches.items() if len(claims[self._drawing_of(name)]) == 1
        }

    def _drawing_of(self, name: str) -> str:
        parent = self.aliases[name]["parent"] if name in self.aliases else name
        return str(parent)
