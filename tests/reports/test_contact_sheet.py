"""A contact sheet is valid SVG with every query and every picture in its place."""

import base64
import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tests.builders import encoded, picture
from vlm.reports.contact_sheet import FoundPicture, SheetRow, contact_sheet_svg

SVG = "{http://www.w3.org/2000/svg}"
GREEN = "#1a9641"


def found(*correct: bool) -> list[FoundPicture]:
    return [
        FoundPicture(encoded(picture(n, size=(100, 50)), "WEBP", lossless=True), right)
        for n, right in enumerate(correct)
    ]


def parse(*rows, title="title"):
    return ElementTree.fromstring(contact_sheet_svg(rows, title=title))


def texts_of(sheet):
    return [element.text for element in sheet.iter(f"{SVG}text")]


def test_queries_and_pictures_of_all_rows_are_there():
    sheet = parse(
        SheetRow([("红苹果", found(True, False)), ("red apple", found(False, False))]),
        SheetRow([("小狗", found(True, True)), ("small dog", found(True, False))]),
        title="What was found",
    )
    assert texts_of(sheet) == ["What was found", "红苹果", "red apple", "小狗", "small dog"]
    assert len(list(sheet.iter(f"{SVG}image"))) == 8
    frames = [rect for rect in sheet.iter(f"{SVG}rect") if rect.get("fill") == "none"]
    assert [rect.get("stroke") == GREEN for rect in frames] == [
        True, False, False, False, True, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["a < b & c", "]]>", '"quoted"', "it's", "<script>1</script>"])
def test_text_is_escaped(text):
    sheet = parse(SheetRow([(text, found(True))]), title=text)
    assert texts_of(sheet) == [text, text]
    assert {element.tag.removeprefix(SVG) for element in sheet.iter()} == {
        "svg", "rect", "text", "image",
    }  # fmt: skip


def test_a_long_query_is_cut_with_an_ellipsis():
    sheet = parse(SheetRow([("x" * 20, found(True)), ("y" * 21, found(True))]))
    assert texts_of(sheet)[1:] == ["x" * 20, "y" * 19 + "…"]


def test_pictures_are_small_png_of_the_right_content():
    image = next(parse(SheetRow([("q", found(True))])).iter(f"{SVG}image"))
    kind, _, content = image.get("href").partition(",")
    assert kind == "data:image/png;base64"
    shown = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
    assert (shown.format, shown.size) == ("PNG", (64, 32))
    expected = np.asarray(picture(0, size=(100, 50)).resize((64, 32)), np.float64)
    assert np.abs(np.asarray(shown, np.float64) - expected).mean() < 5


def test_everything_lies_inside_the_sheet_and_nothing_overlaps():
    rows = [SheetRow([("a", found(*[True] * 5)), ("b", found(*[False] * 3))]) for _ in range(3)]
    sheet = parse(*rows)
    width, height = int(sheet.get("width")), int(sheet.get("height"))
    corners = [(int(i.get("x")), int(i.get("y"))) for i in sheet.iter(f"{SVG}image")]
    assert len(set(corners)) == 24
    assert all(0 <= x <= width - 64 and 0 <= y <= height - 64 for x, y in corners)
    for number, (x, y) in enumerate(corners):
        for other_x, other_y in corners[:number]:
            assert abs(x - other_x) >= 64 or abs(y - other_y) >= 64
