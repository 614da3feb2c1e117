"""Running text out of HTML pages, paragraph by paragraph."""

from collections.abc import Iterator
from html.parser import HTMLParser

_INLINE = {
    "a", "abbr", "b", "bdi", "bdo", "big", "cite", "code", "data", "del", "dfn", "em", "font", "i",
    "ins", "kbd", "mark", "q", "s", "samp", "small", "span", "strong", "sub", "sup", "time", "tt",
    "u", "var", "wbr",
}  # fmt: skip
_WITHOUT_TEXT = {
    "title", "script", "style", "noscript", "template", "nav", "header", "footer", "aside",
}  # fmt: skip


def paragraphs_of(page: str) -> Iterator[str]:
    """Give the paragraphs, headings, items and cells of a page, each with its space as one.

    Navigation, headers, footers, scripts and styles are left out.
    """
    parser = _Paragraphs()
    parser.feed(page)
    parser.close()
    for part in "".join(parser.parts).split(_BREAK):
        if paragraph := " ".join(part.split()):
            yield paragraph


_BREAK = "\0"


class _Paragraphs(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in _WITHOUT_TEXT
        if tag not in _INLINE:
            self.parts.append(_BREAK)

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in _WITHOUT_TEXT and self._hidden > 0
        if tag not in _INLINE:
            self.parts.append(_BREAK)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)
