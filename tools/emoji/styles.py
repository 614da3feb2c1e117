"""The eight drawing styles: which packages they come from and under which licences."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from tools.drawings import decode, draw_svg, encode, flatten, is_blank
from tools.emoji import packages
from tools.emoji.concepts import Concept, concept_key, region_of
from tools.emoji.flags import draw_flag, load_glyphs
from tools.emoji.font import read_noto_font
from tools.emoji.names import keys_by_name, keys_by_squashed_name, match_names, names_by_key
from tools.iconify import IconSet
from tools.packages import Package, fetch, read_archive

# Two of FxEmoji's files show another thing than the emoji of that name: a musical keyboard and a
# program's window.
_FXEMOJI_MISNOMERS = frozenset({"keyboard", "window"})
# "ZZ" is no country: this is what a font draws for a flag that it does not know.
_UNKNOWN_FLAG = "\N{REGIONAL INDICATOR SYMBOL LETTER Z}" * 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """A concept as one artist draws it."""

    concept: Concept
    style: str
    licence: str
    """SPDX identifier."""
    image: bytes
    """The image as it is stored."""


@dataclass(frozen=True, slots=True)
class DrawingSet:
    """Drawings of one style under one licence; they are drawn while they are read."""

    style: str
    licence: str
    images: Iterator[tuple[Concept, Image.Image]]
    """RGBA, in Unicode order."""


def open_drawing_sets(concepts: Sequence[Concept], cache: Path) -> tuple[DrawingSet, ...]:
    """Fetch the packages of every style and make ready to draw the concepts.

    Args:
        concepts: In Unicode order.
        cache: Folder of the downloads.

    Raises:
        DataError: a package or the font cannot be obtained.
    """
    noto = _read_icons(packages.NOTO, cache)
    noto_blob = _read_icons(packages.NOTO_BLOB, cache)
    fluent_flat = _read_icons(packages.FLUENT_FLAT, cache)
    fluent_high_contrast = _read_icons(packages.FLUENT_HIGH_CONTRAST, cache)
    emojione = _read_icons(packages.EMOJIONE, cache)
    fxemoji = _read_icons(packages.FXEMOJI, cache)
    fluent_3d = _read_files(packages.FLUENT_3D, cache, pattern=r"assets/.+\.webp$")
    twemoji = _read_files(packages.TWEMOJI, cache, pattern=r".+/72x72/.+\.png$")
    font = read_noto_font(cache)

    noto_names = names_by_key(noto)
    names = keys_by_name(concepts, tables=(noto_names, names_by_key(fluent_flat)))
    fxemoji_names = {
        name: key
        for name, key in (keys_by_squashed_name(concepts) | names).items()
        if name not in _FXEMOJI_MISNOMERS
    }
    # Noto's SVGs lack the flags of countries; Fluent's 3D flags are Noto's drawings, which must
    # not be trained on.
    noto_lacks = [concept for concept in concepts if concept.key not in noto_names]
    no_countries = [concept for concept in concepts if region_of(concept.key) is None]
    return (
        DrawingSet("emojione", "CC-BY-4.0", draw_icons(emojione, concepts, names)),
        DrawingSet("fluent_3d", "MIT", decode_files(fluent_3d, no_countries)),
        DrawingSet("fluent_flat", "MIT", draw_icons(fluent_flat, concepts)),
        DrawingSet("fluent_high_contrast", "MIT", draw_icons(fluent_high_contrast, concepts)),
        DrawingSet("fxemoji", "CC-BY-4.0", draw_icons(fxemoji, concepts, fxemoji_names)),
        DrawingSet("noto", "Apache-2.0", draw_icons(noto, concepts)),
        DrawingSet("noto", "OFL-1.1", draw_flags(font, noto_lacks)),
        DrawingSet("noto_blob", "Apache-2.0", draw_icons(noto_blob, concepts, names)),
        DrawingSet("twemoji", "CC-BY-4.0", decode_files(twemoji, concepts)),
    )


def distinct_drawings(drawing_sets: Iterable[DrawingSet]) -> Iterator[Drawing]:
    """Draw everything, leaving out blank images and those already seen in their style.

    Several concepts may share a drawing (families, man and person); the first one keeps it.
    """
    seen: set[tuple[str, bytes]] = set()
    for drawing_set in drawing_sets:
        for concept, picture in drawing_set.images:
            flat = flatten(picture)
            image = encode(flat)
            if is_blank(flat) or (drawing_set.style, image) in seen:
                continue
            seen.add((drawing_set.style, image))
            yield Drawing(
                concept=concept,
                style=drawing_set.style,
                licence=drawing_set.licence,
                image=image,
            )


def draw_icons(
    icons: IconSet, concepts: Iterable[Concept], key_by_name: Mapping[str, str] | None = None
) -> Iterator[tuple[Concept, Image.Image]]:
    """Draw the concepts that an icon set has.

    Args:
        icons: The set.
        concepts: What to draw, in this order.
        key_by_name: Names of the concepts, for sets that ship no code points.
    """
    names = names_by_key(icons) if key_by_name is None else match_names(icons, key_by_name)
    for concept in concepts:
        svg = icons.svg(names[concept.key]) if concept.key in names else None
        if svg is not None:
            yield concept, draw_svg(svg)


def decode_files(
    files: Mapping[str, bytes], concepts: Iterable[Concept]
) -> Iterator[tuple[Concept, Image.Image]]:
    """Decode the images whose file names are the code points of a concept."""
    images: dict[str, bytes] = {}
    for name in sorted(files):
        images.setdefault(concept_key(PurePosixPath(name).stem), files[name])
    for concept in concepts:
        if concept.key in images:
            yield concept, decode(images[concept.key])


def draw_flags(font: bytes, concepts: Iterable[Concept]) -> Iterator[tuple[Concept, Image.Image]]:
    """Draw the flags that the font has."""
    glyphs = load_glyphs(font)
    unknown = draw_flag(glyphs, _UNKNOWN_FLAG)
    for concept in concepts:
        image = draw_flag(glyphs, concept.text) if concept.group == "flags" else None
        if image is not None and image != unknown:
            yield concept, image


def _read_icons(package: Package, cache: Path) -> IconSet:
    return IconSet.read(_read_files(package, cache, pattern=r"(icons|chars)\.json$"))


def _read_files(package: Package, cache: Path, *, pattern: str) -> dict[str, bytes]:
    return read_archive(fetch(package, cache), pattern=pattern)
