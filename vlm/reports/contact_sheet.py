"""A contact sheet: examples of what a model found, as one SVG file.

SVG leaves the drawing of text to the viewer, who has Chinese letters even where the machine that
trained the model has no font for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from vlm.images.decoding import ImageSource
from vlm.markdown import width_in_columns
from vlm.reports.elements import data_uri, element, svg_of
from vlm.reports.examples import (
    LEGEND,
    RIGHT_IMAGE,
    RIGHT_SIGN,
    Answer,
    CaptionAnswer,
    CaptionExample,
    Example,
    cosine_in_words,
    thumbnail,
)

_IMAGE, _GAP, _MARGIN = 64, 8, 16
_ANSWER = 5 * (_IMAGE + _GAP) - _GAP
"""Width of an answer in words, which is that of its images where there are five."""

_LETTER = 0.55  # mean width of a letter, in font sizes; a Chinese one takes twice as much
_RIGHT, _OTHER, _PALE = "#1a7f37", "#dddddd", "#666666"
_FONTS = (
    "system-ui, 'Segoe UI', 'Helvetica Neue', 'Noto Sans', 'PingFang SC', 'Microsoft YaHei', "
    "'Noto Sans CJK SC', sans-serif"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Box:
    """Something drawn from (0, 0) to (width, height)."""

    node: Element
    width: int
    height: int


def examples_svg(items: Sequence[Example | CaptionExample], *, title: str) -> str:
    """Return the sheet: a row an example, a block a language; right answers are green and ticked.

    Args:
        items: What to draw.
        title: Stands over the sheet.

    Raises:
        DataError: an image cannot be read.
    """
    heading = _stacked(
        _line(title, size=17, width=2 * _ANSWER),
        _line(LEGEND, size=12, fill=_PALE, width=2 * _ANSWER),
    )
    sheet = _stacked(heading, *map(_example, items), gap=2 * _GAP)
    width, height = str(sheet.width + 2 * _MARGIN), str(sheet.height + 2 * _MARGIN)
    drawing = element(
        "svg",
        element("rect", width=width, height=height, fill="white"),
        _moved(sheet, _MARGIN, _MARGIN),
        xmlns="http://www.w3.org/2000/svg", width=width, height=height,
        viewBox=f"0 0 {width} {height}", font_family=_FONTS,
    )  # fmt: skip
    return svg_of(drawing)


def _example(item: Example | CaptionExample) -> _Box:
    if isinstance(item, CaptionExample):
        boxes = [_image(item.image), *map(_captions, item.answers)]
    else:
        boxes = [_images(answer) for answer in item.answers]
        if item.right is not None:
            name = _line(RIGHT_IMAGE, size=12, fill=_PALE, width=2 * _IMAGE)
            boxes.append(_stacked(name, _image(item.right, right=True)))
    return _side_by_side(*boxes, gap=3 * _GAP)


def _images(answer: Answer) -> _Box:
    """Draw a query with its rank, and the images that it found below."""
    query = _line(answer.query, _rank(answer.rank), language=answer.language)
    found = [
        _stacked(
            _image(one.image, right=one.correct),
            _line(
                f"{RIGHT_SIGN if one.correct else ''} {cosine_in_words(one.cosine)}".strip(),
                size=11, fill=_RIGHT if one.correct else _PALE, width=_IMAGE,
            ),
        )
        for one in answer.found
    ]  # fmt: skip
    return _stacked(query, _side_by_side(*found))


def _captions(answer: CaptionAnswer) -> _Box:
    """Draw the rank of the first right caption, and the captions that an image found below."""
    found = [
        _line(
            f"{RIGHT_SIGN} {one.text}" if one.correct else one.text, cosine_in_words(one.cosine),
            fill=_RIGHT if one.correct else "black", language=answer.language,
        )
        for one in answer.found
    ]  # fmt: skip
    return _stacked(_line(answer.language, _rank(answer.rank), size=12, fill=_PALE), *found)


def _rank(rank: int | None) -> str:
    return "" if rank is None else f"rank {rank:,}"


def _image(image: ImageSource, *, right: bool = False) -> _Box:
    """Draw an image in its frame; PNG, because few viewers of SVG show WebP."""
    content = thumbnail(image, side=_IMAGE, file_format="PNG")
    side = str(_IMAGE)
    shown = element("image", width=side, height=side, href=data_uri(content, "image/png"))
    frame = element(
        "rect", x="-2", y="-2", width=str(_IMAGE + 4), height=str(_IMAGE + 4), fill="none",
        stroke=_RIGHT if right else _OTHER, stroke_width="3" if right else "1",
    )  # fmt: skip
    return _Box(node=element("g", shown, frame), width=_IMAGE, height=_IMAGE)


def _line(
    text: str,
    note: str = "",
    *,
    language: str = "",
    size: int = 14,
    fill: str = "black",
    width: int = _ANSWER,
) -> _Box:
    """Write a text, cut to what fits, and a small note at the right end of its line."""
    room = int((width - 11 * _LETTER * len(note)) / (size * _LETTER))
    style = {"y": str(size), "font_size": str(size), "fill": fill}
    written = element("text", _cut(text, room), **style, **({"lang": language} if language else {}))
    noted = element(
        "text", note, x=str(width), y=str(size), font_size="11", fill=_PALE, text_anchor="end"
    )
    node = element("g", written, *([noted] if note else []))
    return _Box(node=node, width=width, height=max(size + 4, 18))


def _cut(text: str, columns: int) -> str:
    if width_in_columns(text) <= columns:
        return text
    text = text[:columns]
    while width_in_columns(text) >= columns:
        text = text[:-1]
    return f"{text}…"


def _side_by_side(*boxes: _Box, gap: int = _GAP) -> _Box:
    nodes, right = [], -gap
    for box in boxes:
        nodes.append(_moved(box, right + gap, 0))
        right += gap + box.width
    height = max((box.height for box in boxes), default=0)
    return _Box(node=element("g", *nodes), width=max(right, 0), height=height)


def _stacked(*boxes: _Box, gap: int = 4) -> _Box:
    nodes, bottom = [], -gap
    for box in boxes:
        nodes.append(_moved(box, 0, bottom + gap))
        bottom += gap + box.height
    width = max((box.width for box in boxes), default=0)
    return _Box(node=element("g", *nodes), width=width, height=max(bottom, 0))


def _moved(box: _Box, x: int, y: int) -> Element:
    return element("g", box.node, transform=f"translate({x} {y})")
