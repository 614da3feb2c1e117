"""Icon sets of the Iconify project: drawings of a style as SVG, by name or code point."""

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class IconSet:
    """One style's drawings by name; some names are aliases of others."""

    icons: Mapping[str, Mapping[str, Any]]
    aliases: Mapping[str, Mapping[str, Any]]
    width: int
    height: int
    name_by_code_points: Mapping[str, str]
    """Hyphened code points to icon name; empty in older sets, whose icons have names only."""

    @classmethod
    def read(cls, package: Mapping[str, bytes]) -> "IconSet":
        """Read the set from the files of its package."""
        icons = json.loads(package["icons.json"])
        return cls(
            icons=icons["icons"],
            aliases=icons.get("aliases", {}),
            width=icons["width"],
            height=icons["height"],
            name_by_code_points=json.loads(package["chars.json"]),
        )

    def svg(self, name: str) -> str | None:
        """Return the drawing of a name, or None where the set has no faithful one.

        That is an alias that is turned or mirrored, and a drawing whose colors were in a style
        sheet that the set left behind.
        """
        if name in self.aliases and set(self.aliases[name]) != {"parent"}:
            return None
        icon = self.icons[self.drawing_of(name)]
        if 'class="' in icon["body"]:
            return None
        width, height = icon.get("width", self.width), icon.get("height", self.height)
        left, top = icon.get("left", 0), icon.get("top", 0)
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">'
            f"{icon['body']}</svg>"
        )

    def drawing_of(self, name: str) -> str:
        """Return the name of the drawing that a name or an alias stands for."""
        parent = self.aliases[name]["parent"] if name in self.aliases else name
        return str(parent)


def slug(text: str) -> str:
    """Return a name as artists write it: lower-case ASCII words joined by hyphens."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    ascii_text = ascii_text.replace("&", "and").replace("'", "")
    return re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")
