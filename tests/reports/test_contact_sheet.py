"""A contact sheet is valid SVG with every text and every image in its place."""

import base64
import io
import re
from itertools import combinations
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tests.builders import encoded, make_image
from vlm.reports.contact_sheet import examples_svg
from vlm.reports.examples import (
    LEGEND,
    Answer,
    CaptionAnswer,
    CaptionExample,
    Example,
    FoundCaption,
    FoundImage,
)

SVG = "{http://www.w3.org/2000/svg}"
GREEN = "#1a7f37"
IMAGE = encoded(make_image(0, size=(100, 50)), "WEBP", lossless=True)


def images(*correct: bool) -> list[FoundImage]:
    return [
        FoundImage(image=IMAGE, correct=right, cosine=0.5 - place / 10)
        for place, right in enumerate(correct)
    ]


def asking(query: str, *correct: bool, language: str = "en", rank: int | None = None) -> Answer:
    return Answer(language=language, query=query, found=images(*correct), rank=rank)


def captioned(*texts: str) -> CaptionExample:
    found = [FoundCaption(text=text, correct=text == texts[0], cosine=0.25) for text in texts]
    return CaptionExample(image=IMAGE, answers=[CaptionAnswer(language="zh", found=found, rank=1)])


def parse(*items, title="title"):
    return ElementTree.fromstring(examples_svg(items, title=title))


def texts_of(sheet):
    return [element.text for element in sheet.iter(f"{SVG}text")][2:]


def places(element, x=0, y=0):
    """Give every image and text of a drawing with its position on the sheet."""
    moved = re.fullmatch(r"translate\((\d+) (\d+)\)", element.get("transform", "translate(0 0)"))
    x, y = x + int(moved[1]), y + int(moved[2])
    if element.tag in (f"{SVG}image", f"{SVG}text"):
        yield element, x + int(element.get("x", 0)), y + int(element.get("y", 0))
    for child in element:
        yield from places(child, x, y)


def test_queries_ranks_cosines_and_images_of_all_examples_are_there():
    sheet = parse(
        Example(
            answers=[
                asking("红苹果", True, False, language="zh", rank=1),
                asking("red apple", False, rank=1204),
            ],
        ),
        Example(answers=[asking("a free question", False)]),
        title="What was found",
    )
    assert [text.text for text in sheet.iter(f"{SVG}text")][:2] == ["What was found", LEGEND]
    assert texts_of(sheet) == [
        "红苹果", "rank 1", "✓ 0.500", "0.400", "red apple", "rank 1,204", "0.500",
        "a free question", "0.500",
    ]  # fmt: skip
    assert len(list(sheet.iter(f"{SVG}image"))) == 4
    frames = [rect for rect in sheet.iter(f"{SVG}rect") if rect.get("fill") == "none"]
    assert [rect.get("stroke") == GREEN for rect in frames] == [True, False, False, False]
    languages = {text.text: text.get("lang") for text in sheet.iter(f"{SVG}text")}
    assert (languages["红苹果"], languages["red apple"]) == ("zh", "en")


def test_a_right_image_that_was_missed_is_shown_in_green():
    missed = parse(Example(answers=[asking("q", False, rank=9)], right=IMAGE))
    assert texts_of(missed) == ["q", "rank 9", "0.500", "a right image"]
    frames = [rect for rect in missed.iter(f"{SVG}rect") if rect.get("fill") == "none"]
    assert [rect.get("stroke") == GREEN for rect in frames] == [False, True]


def test_an_image_and_the_captions_that_it_finds_are_there():
    sheet = parse(captioned("一只猫", "一条狗"))
    assert texts_of(sheet) == ["zh", "rank 1", "✓ 一只猫", "0.250", "一条狗", "0.250"]
    colours = {text.text: text.get("fill") for text in sheet.iter(f"{SVG}text")}
    assert (colours["✓ 一只猫"], colours["一条狗"]) == (GREEN, "black")
    assert len(list(sheet.iter(f"{SVG}image"))) == 1


@pytest.mark.parametrize("text", ["a < b & c", "]]>", '"quoted"', "it's", "<script>1</script>"])
def test_text_is_escaped(text):
    sheet = parse(Example(answers=[asking(text, True)]), captioned("right", text), title=text)
    assert [each.text for each in sheet.iter(f"{SVG}text")].count(text) == 3
    assert {element.tag.removeprefix(SVG) for element in sheet.iter()} == {
        "svg", "g", "rect", "text", "image",
    }  # fmt: skip


def test_what_xml_cannot_hold_is_replaced():
    sheet = parse(Example(answers=[asking("a\x00b\x1b\ud83dc\ufffe", False)]))
    assert texts_of(sheet)[0] == "a�b��c�"


@pytest.mark.parametrize("letter", ["x", "猫"])
def test_a_long_text_is_cut_with_an_ellipsis_and_a_shorter_one_is_not(letter):
    columns = 2 if letter == "猫" else 1
    shown = [
        texts_of(parse(Example(answers=[asking(letter * (length // columns))])))[0]
        for length in (40, 400)
    ]
    assert shown[0] == letter * (40 // columns)
    assert shown[1].lstrip(letter) == "…"
    assert 40 <= columns * len(shown[1]) <= 50


def test_images_are_small_png_of_the_right_content():
    image = next(parse(Example(answers=[asking("q", True)])).iter(f"{SVG}image"))
    kind, _, content = image.get("href").partition(",")
    assert kind == "data:image/png;base64"
    shown = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
    assert (shown.format, shown.size) == ("PNG", (64, 32))
    expected = np.asarray(make_image(0, size=(100, 50)).resize((64, 32)), np.float64)
    assert np.abs(np.asarray(shown, np.float64) - expected).mean() < 5


def test_everything_lies_inside_the_sheet_and_nothing_overlaps():
    answers = [asking("a", *[True] * 7), asking("b", *[False] * 3)]
    items = [Example(answers=answers, right=IMAGE), captioned(*"abcdefg"), captioned("a")] * 2
    sheet = parse(*items)
    width, height = int(sheet.get("width")), int(sheet.get("height"))
    found = [(x, y, node.tag == f"{SVG}image") for node, x, y in places(sheet)]
    corners = [(x, y) for x, y, is_image in found if is_image]
    lines = [(x, y) for x, y, is_image in found if not is_image]
    assert len(corners) == 2 * (11 + 1 + 1)
    assert all(0 <= x <= width - 64 and 0 <= y <= height - 64 for x, y in corners)
    assert all(0 <= x <= width and 10 <= y <= height for x, y in lines)
    for (x, y), (other_x, other_y) in combinations(corners, 2):
        assert abs(x - other_x) >= 64 or abs(y - other_y) >= 64
    for x, y in corners:
        assert not any(x <= left < x + 64 and y < base < y + 64 for left, base in lines)
    assert len(set(lines)) == len(lines)


def test_a_sheet_without_examples_is_a_sheet():
    assert texts_of(parse()) == []
