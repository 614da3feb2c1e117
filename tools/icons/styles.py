"""The four styles of the icons: the same drawings outlined, colored, solid and in two tones."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops

from tools.drawings import draw_svg, encode, flatten
from tools.iconify import IconSet
from tools.icons import packages
from tools.icons.concepts import Concept
from tools.packages import fetch, read_archive

OUTLINE = "icon_park_outline"
# The style that is the furthest from the others, by gray values.
HELD_OUT_STYLE = "icon_park_solid"
STYLES = {
    OUTLINE: packages.OUTLINE,
    "icon_park": packages.COLOR,
    HELD_OUT_STYLE: packages.SOLID,
    "icon_park_twotone": packages.TWO_TONE,
}

# The styles of a single color leave it to the page; the colored style draws its lines in black.
_INK = "#000"
# Two images are the same drawing if fewer than this ratio of their pixels differ in gray by more
# than this. Icons without areas to fill look alike in all styles.
_SAME_DRAWING = 0.02
_GRAY_DIFFERENCE = 48


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """An icon in one style."""

    concept: Concept
    icon: str
    """IconPark's name of the icon."""
    style: str
    image: bytes
    """The image as it is stored."""


def open_icon_sets(cache: Path) -> dict[str, IconSet]:
    """Fetch the icon sets of all styles.

    Args:
        cache: Folder of the downloads.

    Raises:
        DataError: a package cannot be obtained.
    """
    return {
        style: IconSet.read(read_archive(fetch(package, cache), pattern=r"(icons|chars)\.json$"))
        for style, package in STYLES.items()
    }


def distinct_drawings(
    icon_sets: Mapping[str, IconSet], concepts: Iterable[Concept]
) -> Iterator[Drawing]:
    """Draw everything in every style, leaving out what another image shows already.

    That is an image that equals an earlier one of its style, and one that shows the outlined
    drawing again because the icon has no area to fill.

    Args:
        icon_sets: By style; the outlined one has every icon.
        concepts: What to draw, in this order.
    """
    seen: set[tuple[str, bytes]] = set()
    for concept in concepts:
        for icon in concept.icons:
            for style, flat in _styles_of(icon, icon_sets).items():
                image = encode(flat)
                if (style, image) not in seen:
                    seen.add((style, image))
                    yield Drawing(concept=concept, icon=icon, style=style, image=image)


def draw(icons: IconSet, name: str) -> Image.Image:
    """Draw an icon on white; the result is RGB."""
    svg = icons.svg(name)
    assert svg is not None, name
    return flatten(draw_svg(svg.replace("currentColor", _INK)))


def is_same_drawing(image: Image.Image, other: Image.Image) -> bool:
    """Tell whether two images differ in less than 2 % of their pixels."""
    difference = ImageChops.difference(image.convert("L"), other.convert("L"))
    different = sum(difference.histogram()[_GRAY_DIFFERENCE + 1 :])
    return different < _SAME_DRAWING * image.width * image.height


def _styles_of(icon: str, icon_sets: Mapping[str, IconSet]) -> dict[str, Image.Image]:
    flat = {style: draw(icons, icon) for style, icons in icon_sets.items() if icon in icons.icons}
    return {
        style: image
        for style, image in flat.items()
        if style == OUTLINE or not is_same_drawing(image, flat[OUTLINE])
    }
