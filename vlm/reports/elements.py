"""Elements of HTML and SVG, built as a tree, so that text of strangers can never be mark-up."""

import base64
import re
from xml.etree import ElementTree

Node = ElementTree.Element | str
"""An element, or text, which is escaped where the tree is written."""

_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def element(tag: str, *children: Node, **attributes: str) -> ElementTree.Element:
    """Return an element with its children in order.

    Args:
        tag: Its name.
        children: Elements and texts.
        attributes: By name, where an underscore stands for a hyphen and one at the end, as in
            `class_`, is left out.
    """
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    made = ElementTree.Element(tag, named)
    last: ElementTree.Element | None = None
    for child in children:
        if isinstance(child, ElementTree.Element):
            made.append(child)
            last = child
        elif last is None:
            made.text = (made.text or "") + child
        else:
            last.tail = (last.tail or "") + child
    return made


def html_of(root: ElementTree.Element) -> str:
    """Return a tree as an HTML document."""
    written = ElementTree.tostring(root, encoding="unicode", method="html")
    return printable(f"<!DOCTYPE html>\n{written}\n")


def svg_of(root: ElementTree.Element) -> str:
    """Return a tree as an SVG file."""
    return printable(ElementTree.tostring(root, encoding="unicode") + "\n")


def printable(text: str) -> str:
    """Return a text whose control characters and halves of characters are replaced by U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", text)


def data_uri(content: bytes, media_type: str) -> str:
    """Return an address that holds the content itself."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
