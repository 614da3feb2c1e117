"""A report as a document of blocks, written as Markdown and, by `html_page.py`, as a page."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from vlm.errors import ConfigError
from vlm.files import write_file
from vlm.markdown import markdown_table
from vlm.reports.contact_sheet import examples_svg
from vlm.reports.elements import printable
from vlm.reports.examples import CaptionExample, Example

MEDIA_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
"""The kinds of figures, by the ends of their names."""

_CODE = re.compile(r"`([^`]+)`")
_MARK_UP = re.compile(
    r"[\\`*~$]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # within a word, `_` is a letter
    r"|<(?=[\w/!?])|&(?=#?\w+;)|\](?=[(\[:])"
)
_START_OF_BLOCK = re.compile(r"^(\d*)([#>+-]|(?<=\d)[.)])(?=\s|$|[#-]|(?<=>))")


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Plain text; `code` in backticks is the only mark-up, here and in all that follows."""

    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list of short texts."""

    items: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of cells, as many as the header has names."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    """How many columns at the beginning hold text; the others hold numbers."""
    caption: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """An image.

    Raises:
        ConfigError: its name is no file name that ends in `.png` or `.svg`.
    """

    name: str
    """The file to write it to, beside the report."""
    content: bytes
    alt: str
    """What it shows, for those who do not see it."""

    def __post_init__(self) -> None:
        _check_name(self.name, MEDIA_TYPES)


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """Lines that are shown as they are."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """What a model found: elements on the page, a contact sheet in Markdown.

    Raises:
        ConfigError: its name is no file name that ends in `.svg`.
    """

    name: str
    """The file to write the contact sheet to, beside the report."""
    items: Sequence[Example | CaptionExample]
    title: str

    def __post_init__(self) -> None:
        _check_name(self.name, (".svg",))


Block = Paragraph | Bullets | Table | Figure | CodeBlock | Examples


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Blocks under a heading."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A report."""

    title: str
    summary: Sequence[Block]
    """What stands before the first section."""
    sections: Sequence[Section]


def as_markdown(document: Document) -> str:
    """Return a document as Markdown, whose images are the files of `write_report`."""
    parts = [f"# {_inline(document.title)}", *map(_markdown, document.summary)]
    for section in document.sections:
        parts += [f"## {_inline(section.title)}", *map(_markdown, section.blocks)]
    return printable("\n\n".join(parts) + "\n")


def write_report(folder: Path, document: Document, *, name: str = "report") -> Path:
    """Write a document as Markdown and as a page, with its images; return the page.

    Args:
        folder: Where the files go; made where it is missing.
        document: What to write.
        name: Of the two files, without `.md` and `.html`.

    Raises:
        ConfigError: two images have the same name.
        DataError: an image of an example cannot be read.
        VlmError: a file cannot be written.
    """
    from vlm.reports.html_page import as_html  # which knows the blocks of this module

    files: dict[str, bytes] = {}
    for image, content in _images(document):
        if image in files:
            raise ConfigError(f"two images of a report are named {image}; expected one")
        files[image] = content
    page = folder / f"{name}.html"
    files |= {f"{name}.md": as_markdown(document).encode(), page.name: as_html(document).encode()}
    for file, content in files.items():
        write_file(folder / file, content)
    return page


def without_code(text: str) -> str:
    """Return a text that comes from elsewhere, whose backticks shall be no mark-up."""
    return text.replace("`", "'")


def text_and_code(text: str) -> list[str]:
    """Return the parts of a text: plain text and code in turn, beginning with plain text."""
    return _CODE.split(" ".join(text.split()))


def _images(document: Document) -> Iterator[tuple[str, bytes]]:
    for blocks in (document.summary, *(section.blocks for section in document.sections)):
        for block in blocks:
            if isinstance(block, Figure):
                yield block.name, block.content
            elif isinstance(block, Examples):
                yield block.name, examples_svg(block.items, title=block.title).encode()


def _markdown(block: Block) -> str:
    match block:
        case Paragraph():
            return _paragraph(block.text)
        case Bullets():
            return "\n".join(f"* {_paragraph(item)}" for item in block.items)
        case Table():
            return _table(block)
        case Figure():
            return _image(block.alt, block.name)
        case CodeBlock():
            longest = max(map(len, re.findall("`+", block.text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}\n{block.text.rstrip()}\n{fence}"
        case Examples():
            return f"### {_inline(block.title)}\n\n{_image(block.title, block.name)}"


def _table(table: Table) -> str:
    header, *rows = [[_inline(cell) for cell in row] for row in (table.header, *table.rows)]
    lines = markdown_table(header, rows, text_columns=table.text_columns)
    return f"{_paragraph(table.caption)}\n\n{lines}" if table.caption else lines


def _image(alt: str, name: str) -> str:
    plain = re.sub(r"[\\\[\]`*_<&]", r"\\\g<0>", " ".join(alt.split()))
    return f"![{plain}]({quote(name)})"


def _paragraph(text: str) -> str:
    """Return a text that is a paragraph whatever it begins with."""
    return _START_OF_BLOCK.sub(r"\1\\\2", _inline(text))


def _inline(text: str) -> str:
    """Return a text that is shown as it is, except for code."""
    parts = text_and_code(text)
    return "".join(
        f"`{part}`" if number % 2 else _MARK_UP.sub(r"\\\g<0>", part)
        for number, part in enumerate(parts)
    )


def _check_name(name: str, endings: Collection[str]) -> None:
    if Path(name).name != name or Path(name).suffix not in endings:
        raise ConfigError(
            f"an image of a report is named {name!r}; expected a file name that ends in "
            f"{' or '.join(endings)}"
        )
