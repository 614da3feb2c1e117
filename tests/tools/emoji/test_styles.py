"""Styles draw what their packages hold; one drawing is one sample, blanks are none."""

import io
import json
import tarfile

import pytest
from PIL import Image

from tools.emoji import styles
from tools.emoji.styles import (
    DrawingSet,
    decode_files,
    distinct_drawings,
    draw_flags,
    draw_icons,
)
from tools.iconify import IconSet
from tools.packages import read_archive

RED, BLUE = (255, 0, 0, 255), (0, 0, 255, 255)
SQUARE = '<path fill="{color}" d="M0 0h16v16H0z"/>'


def image(color):
    return Image.new("RGBA", (64, 64), color)


def png(color):
    buffer = io.BytesIO()
    image(color).save(buffer, "PNG")
    return buffer.getvalue()


def keys_of(drawn):
    return [concept.key for concept, _ in drawn]


@pytest.fixture
def icons(tmp_path):
    """Return an icon set read from a small package archive."""
    files = {
        "icons.json": {
            "icons": {
                "red-square": {"body": SQUARE.format(color="#f00")},
                "tall-blue": {"body": SQUARE.format(color="#00f"), "height": 32},
                "style-lost": {"body": '<path class="st0" d="M0 0h16v16H0z"/>'},
            },
            "aliases": {
                "red": {"parent": "red-square"},
                "turned": {"parent": "red-square", "hFlip": True},
            },
            "width": 16,
            "height": 16,
        },
        "chars.json": {
            "1f7e5": "red",
            "1f7e6": "tall-blue",
            "1f7e7": "turned",
            "1f7e8": "style-lost",
        },
    }
    path = tmp_path / "icons.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            encoded = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(encoded)
            archive.addfile(member, io.BytesIO(encoded))
    return IconSet.read(read_archive(path))


def test_icons_are_drawn_in_the_order_of_the_concepts(icons, make_concept):
    concepts = [make_concept("1F7E6"), make_concept("1F7E5"), make_concept("2600")]
    (first, blue), (second, red) = draw_icons(icons, concepts)
    assert [first.key, second.key] == ["1F7E6", "1F7E5"]
    assert red.getpixel((32, 32)) == RED
    assert blue.getpixel((32, 8)) == BLUE  # 16 of its 32 units, in the middle of the square
    assert blue.getpixel((4, 8))[3] == 0


def test_turned_aliases_and_lost_style_sheets_are_not_drawn(icons, make_concept):
    assert list(draw_icons(icons, [make_concept("1F7E7"), make_concept("1F7E8")])) == []


def test_icons_without_code_points_are_found_by_name(icons, make_concept):
    drawn = draw_icons(icons, [make_concept("1F534")], {"red-square": "1F534"})
    assert keys_of(drawn) == ["1F534"]


def test_files_are_found_by_their_code_points(make_concept):
    files = {"assets/2600-fe0f.png": png(RED), "assets/unknown.png": b"not an image"}
    ((concept, drawn),) = decode_files(files, [make_concept("2600"), make_concept("2601")])
    assert concept.key == "2600"
    assert drawn.getpixel((0, 0)) == RED


def test_the_first_concept_keeps_a_drawing_that_several_share(make_concept):
    man, woman, sun = make_concept("1F468"), make_concept("1F469"), make_concept("2600")
    drawings = [(man, image(RED)), (woman, image(RED)), (sun, image(BLUE))]
    kept = distinct_drawings([DrawingSet("twemoji", "CC-BY-4.0", iter(drawings))])
    assert [drawing.concept.key for drawing in kept] == ["1F468", "2600"]


def test_styles_may_hold_equal_drawings_of_one_concept(make_concept):
    sets = [
        DrawingSet(style, licence, iter([(make_concept("2600"), image(RED))]))
        for style, licence in (("twemoji", "CC-BY-4.0"), ("noto", "Apache-2.0"))
    ]
    kept = list(distinct_drawings(sets))
    assert [drawing.style for drawing in kept] == ["twemoji", "noto"]
    assert [drawing.licence for drawing in kept] == ["CC-BY-4.0", "Apache-2.0"]


def test_blank_drawings_are_left_out(make_concept):
    blank = (make_concept("2600"), image((255, 255, 255, 0)))
    assert list(distinct_drawings([DrawingSet("noto", "OFL-1.1", iter([blank]))])) == []


def test_a_flag_that_the_font_does_not_know_is_left_out(make_concept, monkeypatch):
    known = {"\U0001f1e8\U0001f1f3": image(RED)}
    monkeypatch.setattr(styles, "load_glyphs", lambda font: None)
    monkeypatch.setattr(styles, "draw_flag", lambda _, text: known.get(text, image(BLUE)))
    concepts = [
        make_concept("1F1E8-1F1F3", group="flags"),
        make_concept("1F1E8-1F1F6", group="flags"),
        make_concept("2600"),
    ]
    assert keys_of(draw_flags(b"", concepts)) == ["1F1E8-1F1F3"]
