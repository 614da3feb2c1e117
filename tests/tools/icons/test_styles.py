"""Every style draws what it has; what looks like the outlined drawing is that drawing."""

import io

import pytest
from PIL import Image

from tools.iconify import IconSet
from tools.icons.concepts import Concept
from tools.icons.styles import OUTLINE, distinct_drawings, draw, is_same_drawing

RING = '<path fill="none" stroke="currentColor" stroke-width="4" d="M4 4h40v40H4z"/>'
DISC = '<path fill="currentColor" d="M4 4h40v40H4z"/>'
BLUE = '<path fill="#2f88ff" d="M4 4h40v40H4z"/>'


def icon_set(**bodies):
    icons = {name: {"body": body} for name, body in bodies.items()}
    return IconSet(icons=icons, aliases={}, width=48, height=48, name_by_code_points={})


def concept(name, *icons):
    captions = {"en": (name,), "zh": (name,)}
    return Concept(key=name, group="shapes", captions=captions, icons=icons, is_new=False)


def test_an_icon_is_drawn_once_in_every_style_that_has_it():
    sets = {
        OUTLINE: icon_set(box=RING, hat=RING[:-2] + ' opacity=".5"/>'),
        "solid": icon_set(box=DISC),
    }
    drawings = list(distinct_drawings(sets, [concept("box", "box"), concept("hat", "hat")]))
    assert [(drawing.icon, drawing.style) for drawing in drawings] == [
        ("box", OUTLINE),
        ("box", "solid"),
        ("hat", OUTLINE),
    ]
    with Image.open(io.BytesIO(drawings[1].image)) as image:
        assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (64, 64))
        assert max(image.getpixel((32, 32))) < 10
        assert min(image.getpixel((1, 1))) > 245


def test_a_style_that_shows_the_outlined_drawing_again_is_left_out():
    sets = {OUTLINE: icon_set(box=RING), "solid": icon_set(box=RING), "color": icon_set(box=BLUE)}
    drawn = distinct_drawings(sets, [concept("box", "box")])
    assert [drawing.style for drawing in drawn] == [OUTLINE, "color"]


def test_equal_images_of_a_style_are_kept_once():
    sets = {OUTLINE: icon_set(box=RING, case=RING)}
    drawn = distinct_drawings(sets, [concept("box", "box", "case")])
    assert [drawing.icon for drawing in drawn] == ["box"]


def test_colors_that_a_set_leaves_open_are_black():
    assert draw(icon_set(box=DISC), "box").getpixel((32, 32)) == (0, 0, 0)
    assert draw(icon_set(box=BLUE), "box").getpixel((32, 32)) == (0x2F, 0x88, 0xFF)


@pytest.mark.parametrize(("side", "same"), [(8, True), (10, False)])  # 1.6 % and 2.4 % of 64 x 64
def test_drawings_are_the_same_if_few_pixels_differ(side, same):
    image = Image.new("RGB", (64, 64), "white")
    other = image.copy()
    other.paste("black", (0, 0, side, side))
    assert is_same_drawing(image, other) == same


def test_a_light_shade_is_no_difference():
    image = Image.new("RGB", (64, 64), "white")
    assert is_same_drawing(image, Image.new("RGB", (64, 64), (210, 210, 210)))
    assert not is_same_drawing(image, Image.new("RGB", (64, 64), (200, 200, 200)))
