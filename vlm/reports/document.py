"""A report as a document of blocks, written as Markdown and as one self-contained HTML page."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined

from vlm.errors import ConfigError
from vlm.files import write_file
from vlm.images.decoding import ImageSource, decode_image
from vlm.markdown import markdown_table
from vlm.reports.examples import Example

_THUMBNAIL = 96  # pixels; shown at 72 and less, for screens with more than one dot a pixel
_CODE = re.compile(r"`([^`]+)`")
_MARK_UP = re.compile(r"[\\`*~$<&\[\]]|(?<![^\W_])_|_(?![^\W_])")  # `_` within a word is a letter
_START_OF_BLOCK = re.compile(r"^(\d*)([-#>+=.)])")  # headings, quotes, lists and rules
_CHINESE = re.compile(
    "([\u2e80-\u303f\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U000323af]+)"
)
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Plain text; `code` in backticks is the only mark-up, as in all other blocks."""

    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list of short texts."""

    items: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows with a cell for each name in the header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    """How many columns at the beginning hold text; the others hold numbers."""
    caption: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A PNG image.

    Raises:
        ConfigError: its name is not a file name that ends in `.png`.
    """

    name: str
    """The file to write it to, next to the report."""
    content: bytes
    alt: str
    """What it shows, for those who do not see it."""

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or Path(self.name).suffix != ".png":
            raise ConfigError(
                f"a figure is named {self.name!r}; expected a file name that ends in .png"
            )


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """Lines that are shown as they are."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """What a model found, with images; only the HTML page shows them."""

    title: str
    examples: Sequence[Example]


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
    """The blocks before the first section."""
    sections: Sequence[Section]


def write_report(folder: Path, document: Document, *, name: str = "report") -> Path:
    """Write a document as Markdown and as a page, with its figures; return the page.

    Args:
        folder: Where the files go; created if missing.
        document: What to write.
        name: Of the two files, without `.md` and `.html`.

    Raises:
        ConfigError: two figures have the same name.
        DataError: an image of an example cannot be read.
        VlmError: a file cannot be written.
    """
    files: dict[str, bytes] = {}
    for blocks in (document.summary, *(section.blocks for section in document.sections)):
        for figure in blocks:
            if isinstance(figure, Figure):
                if figure.name in files:
                    raise ConfigError(f"two figures of a report are named {figure.name}")
                files[figure.name] = figure.content
    page = folder / f"{name}.html"
    files |= {f"{name}.md": as_markdown(document).encode(), page.name: as_html(document).encode()}
    for file, content in files.items():
        write_file(folder / file, content)
    return page


def as_html(document: Document) -> str:
    """Return a document as a page with its images and its style inside.

    Raises:
        DataError: an image of an example cannot be read.
    """
    here = resources.files("vlm.reports")
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "chinese_parts": _CHINESE.split,  # every second part is the match
        "code_parts": _code_parts,
        "cosine": lambda cosine: "" if cosine is None else f"{cosine:.3f}",
        "data_uri": lambda content, media_type: (
            f"data:{media_type};base64,{base64.b64encode(content).decode()}"
        ),
        "kind": lambda block: type(block).__name__,
        "thumbnail": thumbnail,
    }
    template = environment.from_string(here.joinpath("page.html").read_text(encoding="utf-8"))
    style = here.joinpath("page.css").read_text(encoding="utf-8")
    return _printable(template.render(document=document, style=style))


def thumbnail(image: ImageSource) -> bytes:
    """Return a small WebP file of an image, transparency on white.

    Raises:
        DataError: the image cannot be read.
    """
    small = decode_image(image)
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP")
    return buffer.getvalue()


def as_markdown(document: Document) -> str:
    """Return a document as Markdown, whose images are the files of `write_report`."""
    parts = [f"# {_inline(document.title)}", *map(_markdown, document.summary)]
    for section in document.sections:
        parts += [f"## {_inline(section.title)}", *map(_markdown, section.blocks)]
    return _printable("\n\n".join(parts) + "\n")


def without_code(text: str) -> str:
    """Return foreign text so that its backticks are not read as code."""
    return text.replace("`", "'")


def score_cell(value: float, interval: tuple[float, float] | None = None) -> str:
    """Return a score and, where it is known, half the width of its interval: `0.512 ±0.021`."""
    if interval is None:
        return f"{value:.3f}"
    return f"{value:.3f} ±{(interval[1] - interval[0]) / 2:.3f}"


def _markdown(block: Block) -> str:
    match block:
        case Paragraph():
            return _paragraph(block.text)
        case Bullets():
            return "\n".join(f"* {_paragraph(item)}" for item in block.items)
        case Table():
            header, *rows = [[*map(_inline, row)] for row in (block.header, *block.rows)]
            lines = markdown_table(header, rows, text_columns=block.text_columns)
            return f"{_paragraph(block.caption)}\n\n{lines}" if block.caption else lines
        case Figure():
            alt = _MARK_UP.sub(r"\\\g<0>", " ".join(block.alt.split()))
            return f"![{alt}]({quote(block.name)})"
        case CodeBlock():
            longest = max(map(len, re.findall("`+", block.text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}\n{block.text.rstrip()}\n{fence}"
        case Examples():
            return f"### {_inline(block.title)}\n\nThe HTML page shows these examples."


def _paragraph(text: str) -> str:
    """Return Markdown that is a paragraph whatever the text begins with."""
    return _START_OF_BLOCK.sub(r"\1\\\2", _inline(text))


def _inline(text: str) -> str:
    """Return Markdown that shows a text as it is, except for code."""
    return "".join(
        f"`{part}`" if number % 2 else _MARK_UP.sub(r"\\\g<0>", part)
        for number, part in enumerate(_code_parts(text))
    )


def _code_parts(text: str) -> list[str]:
    """Split a text into plain text and code in turn, beginning with plain text."""
    return _CODE.split(" ".join(text.split()))


def _printable(text: str) -> str:
    """Replace control characters and lone surrogates, which no file can hold, by U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", text)
