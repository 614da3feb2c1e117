"""A document as one HTML page that needs nothing else: no network, no scripts, no other files."""

import re
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import chain, count
from pathlib import Path
from xml.etree.ElementTree import Element

from vlm.images.decoding import ImageSource
from vlm.reports.document import (
    MEDIA_TYPES,
    Block,
    Bullets,
    CodeBlock,
    Document,
    Examples,
    Figure,
    Paragraph,
    Section,
    Table,
    text_and_code,
)
from vlm.reports.elements import Node, data_uri, element, html_of
from vlm.reports.examples import (
    LEGEND,
    RIGHT_IMAGE,
    RIGHT_SIGN,
    Answer,
    CaptionAnswer,
    CaptionExample,
    Example,
    FoundCaption,
    FoundImage,
    cosine_in_words,
    thumbnail,
)

_THUMBNAIL = 96  # pixels; shown a little smaller, for screens with fine dots
_FEWEST_LISTED = 3  # sections, for a table of contents
_CHINESE = re.compile(
    "([\u2e80-\u303f\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U000323af]+)"
)
_NOTHING_ELSE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def as_html(document: Document) -> str:
    """Return a document as a page with its images and its style inside.

    Raises:
        DataError: an image of an example cannot be read.
    """
    style = resources.files("vlm.reports").joinpath("html_page.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=_NOTHING_ELSE),
        element("title", "".join(text_and_code(document.title))),
        element("style", style),
    )
    anchors = _anchors([section.title for section in document.sections])
    header = element(
        "header", element("h1", *_marked_up(document.title)), *map(_block, document.summary)
    )
    contents = [_contents(document.sections, anchors)] * (len(anchors) >= _FEWEST_LISTED)
    sections = map(_section, document.sections, anchors)
    body = element("body", *contents, element("main", header, *sections))
    return html_of(element("html", head, body, lang="en"))


def _anchors(titles: Sequence[str]) -> list[str]:
    """Return a name for each section, made of its title, no two the same."""
    anchors: list[str] = []
    for title in titles:
        plain = re.sub(r"\W+", "-", title.lower()).strip("-") or "section"
        numbered = (f"{plain}-{number}" for number in count(2))
        anchors.append(next(name for name in chain([plain], numbered) if name not in anchors))
    return anchors


def _contents(sections: Sequence[Section], anchors: Sequence[str]) -> Element:
    links = [
        element("li", element("a", *_marked_up(section.title), href=f"#{anchor}"))
        for section, anchor in zip(sections, anchors, strict=True)
    ]
    return element("nav", element("ul", *links), aria_label="Contents")


def _section(section: Section, anchor: str) -> Element:
    heading = element("h2", *_marked_up(section.title))
    return element("section", heading, *map(_block, section.blocks), id=anchor)


def _block(block: Block) -> Element:
    match block:
        case Paragraph():
            return element("p", *_marked_up(block.text))
        case Bullets():
            return element("ul", *(element("li", *_marked_up(item)) for item in block.items))
        case Table():
            return _table(block)
        case Figure():
            source = data_uri(block.content, MEDIA_TYPES[Path(block.name).suffix])
            return element("figure", element("img", src=source, alt=block.alt))
        case CodeBlock():
            return element("pre", element("code", block.text.rstrip()), tabindex="0")
        case Examples():
            return _examples(block)


def _table(table: Table) -> Element:
    """Return a table in a box that scrolls sideways where the screen is narrow."""
    kinds = ["" if column < table.text_columns else "number" for column in range(len(table.header))]
    header = [
        element("th", *_marked_up(name), scope="col", class_=kind)
        for name, kind in zip(table.header, kinds, strict=True)
    ]
    rows = [
        element(
            "tr",
            *(
                element("td", *_marked_up(cell), class_=kind)
                for cell, kind in zip(cells, kinds, strict=True)
            ),
        )
        for cells in table.rows
    ]
    caption = [element("caption", *_marked_up(table.caption))] if table.caption else []
    head = element("thead", element("tr", *header))
    whole = element("table", *caption, head, element("tbody", *rows))
    name = table.caption or "Table"
    return element("div", whole, class_="table", tabindex="0", role="region", aria_label=name)


def _examples(block: Examples) -> Element:
    return element(
        "div",
        element("h3", *_marked_up(block.title)),
        element("p", LEGEND, class_="legend"),
        *(_example(item) for item in block.items),
        class_="examples",
    )


def _example(item: Example | CaptionExample) -> Element:
    if isinstance(item, CaptionExample):
        image = _image(item.image, alt="image that is asked", kind="asked")
        return element("article", image, *map(_captions, item.answers), class_="example")
    missed = []
    if item.right is not None:
        image = _image(item.right, alt=RIGHT_IMAGE, kind="right")
        missed = [element("figure", image, element("figcaption", RIGHT_IMAGE), class_="missed")]
    return element("article", *map(_images, item.answers), *missed, class_="example")


def _images(answer: Answer) -> Element:
    """Return a query with its rank, and the images that it found."""
    query = element("p", answer.query, class_="query", lang=answer.language)
    found = [_found_image(one, place) for place, one in enumerate(answer.found, start=1)]
    heading = _answer_heading(query, "image", answer.rank)
    return element("div", heading, element("ol", *found, class_="images"), class_="answer")


def _found_image(found: FoundImage, place: int) -> Element:
    kind = "right" if found.correct else "other"
    alt = f"image found at rank {place}{', right' if found.correct else ''}"
    verdict = f"{RIGHT_SIGN if found.correct else ''} {cosine_in_words(found.cosine)}".strip()
    return element(
        "li", _image(found.image, alt=alt, kind=kind), element("small", verdict), class_=kind
    )


def _captions(answer: CaptionAnswer) -> Element:
    """Return the captions of one language that an image found, with the rank of a right one."""
    found = [_found_caption(one, answer.language) for one in answer.found]
    language = element("p", answer.language, class_="language")
    heading = _answer_heading(language, answer.what, answer.rank)
    return element("div", heading, element("ol", *found, class_="captions"), class_="answer")


def _found_caption(found: FoundCaption, language: str) -> Element:
    sign = [element("b", f"{RIGHT_SIGN} ")] if found.correct else []
    return element(
        "li",
        element("span", *sign, element("span", found.text, lang=language)),
        element("small", cosine_in_words(found.cosine)),
        class_="right" if found.correct else "other",
    )


def _answer_heading(words: Element, what: str, rank: int | None) -> Element:
    """Return what was asked and, where it is known, the rank of the first right answer."""
    found = [] if rank is None else [element("p", f"right {what} at rank {rank:,}", class_="rank")]
    return element("div", words, *found, class_="question")


def _image(image: ImageSource, *, alt: str, kind: str) -> Element:
    content = thumbnail(image, side=_THUMBNAIL, file_format="WEBP")
    return element("img", src=data_uri(content, "image/webp"), alt=alt, class_=kind)


def _marked_up(text: str) -> Iterator[Node]:
    """Give the parts of a text: code as such, and Chinese said to be Chinese."""
    for number, part in enumerate(text_and_code(text)):
        nodes = [
            element("span", piece, lang="zh") if place % 2 else piece
            for place, piece in enumerate(_CHINESE.split(part))
        ]
        yield from [element("code", *nodes)] if number % 2 else nodes
