"""Text, pages and JSON lines in a stream; `tables` and `scanning` read what else has records.

Each reader gives pairs of a place (`line 3`, `row 3`, `sample 'a'`) and the record there. However
large a file is, only a block of it is in memory. Lines end with a line feed, with or without a
carriage return before it, and with nothing else; text is UTF-8, and a byte order mark is dropped.
"""

import gzip
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, TypeVar

import pyarrow

from vlm.errors import DataError, ShardError

BLOCK = 1 << 17
LONGEST = 1 << 26  # bytes of a line, cell or member: a file without line ends must not fill memory
_HEAD = 1 << 16
DAMAGE = (
    OSError, EOFError, ValueError, OverflowError, RecursionError, zlib.error, tarfile.TarError,
    pyarrow.ArrowException,
)  # fmt: skip
"""What the readers of tars, tables and packed files raise on bytes that are not what they read."""

_REGION = r"(?:[-_](?i:hans|hant|latn|[a-z]{2}|[0-9]{3}))"  # or a script
LANGUAGE_TAG = rf"[a-z]{{2,3}}{_REGION}*"
_WITH_REGION = re.compile(rf"([a-z]{{2,3}}){_REGION}+")

_T = TypeVar("_T")
Advance = Callable[[int], object]
"""Called with a number of bytes each time some were read."""


def ignore(_: int) -> None:
    """Do nothing with a number of bytes."""


def guarded(path: Path, records: Iterator[tuple[str, _T]]) -> Iterator[tuple[str, _T]]:
    """Let what a reader trips over name the file, and the last place that could be read.

    Raises:
        ShardError: the file is missing or damaged.
    """
    place = ""
    try:
        for place, record in records:
            yield place, record
    except DAMAGE as error:
        after = f" after {place}" if place else ""
        reason = getattr(error, "strerror", None) or error
        raise ShardError(f"{path} cannot be read{after}: {reason}") from error


# Readers.


def lines_of(path: Path, *, advance: Advance = ignore) -> Iterator[tuple[str, str]]:
    """Give every line of a text file, blank ones too, without its end.

    Raises:
        DataError: as all readers here: the file is damaged, or not UTF-8; with the place.
    """
    for place, line in raw_lines(path, advance):
        yield place, line.rstrip("\r\n")


def paragraphs_of(path: Path, *, advance: Advance = ignore) -> Iterator[tuple[str, str]]:
    """Give the paragraphs, headings, items and cells of an HTML page, each with its space as one.

    Navigation, headers, footers, scripts and styles are left out. The page is read as a whole.
    """
    page = _Page()
    for _, line in raw_lines(path, advance):
        page.feed(line)
    page.close()
    texts = (" ".join(part.split()) for part in "".join(page.parts).split(_Page.BREAK))
    for number, text in enumerate(filter(None, texts), start=1):
        yield f"paragraph {number}", text


def objects_of(path: Path, *, advance: Advance = ignore) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the object in every line of JSON that is not blank."""
    for place, line in raw_lines(path, advance):
        if line.strip():
            yield place, object_in(line, f"{path}, {place}")


def raw_lines(
    path: Path, advance: Advance = ignore, longest: int | None = None
) -> Iterator[tuple[str, str]]:
    """Give the lines of a file with their ends, each as soon as it is there.

    It is unpacked if its name ends in `.gz`; a line may have at most `longest` bytes.
    """
    return guarded(path, _raw_lines(path, advance, longest or LONGEST))


def _raw_lines(path: Path, advance: Advance, longest: int) -> Iterator[tuple[str, str]]:
    with _CountedFile(path, advance) as counted, io.BufferedReader(counted, BLOCK) as buffered:
        packed = path.name.lower().endswith(".gz")
        file = gzip.GzipFile(fileobj=buffered) if packed else buffered
        for number, line in enumerate(iter(partial(file.readline, longest + 1), b""), start=1):
            place = f"line {number}"
            if len(line) > longest:
                raise DataError(f"{path}, {place} is longer than {longest} bytes")
            yield place, decoded(line, f"{path}, {place}")


class _CountedFile(io.FileIO):
    """A file that tells how many bytes are read from it; to be read through a buffer."""

    def __init__(self, path: Path, advance: Advance) -> None:
        super().__init__(path, "r")
        self._advance = advance

    def readinto(self, buffer: Any) -> int:
        read = super().readinto(buffer) or 0
        self._advance(read)
        return read


def first_line(path: Path) -> str:
    """Return the first line that is not blank, or nothing if it is not text or very long."""
    lines = (line for _, line in raw_lines(path, longest=_HEAD))
    try:
        return next(filter(str.strip, lines), "").rstrip("\r\n")
    except DataError:
        return ""


def first_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in the first line, or nothing if it is something else."""
    try:
        return object_in(first_line(path), "")
    except DataError:
        return {}


# What records hold.


def decoded(content: bytes, name: str) -> str:
    """Return text in UTF-8, without a byte order mark; errors begin with `name`."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte, reason = f"0x{error.object[error.start]:02x}", error.reason
        raise DataError(
            f"{name}: byte {byte} at {error.start} is not UTF-8 ({reason}); expected text in UTF-8"
        ) from error


def object_in(text: str, name: str) -> dict[str, Any]:
    """Return the JSON object that a text is; errors begin with `name`."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{name} is a JSON {type(record).__name__}; expected an object")
    return record


def texts_in(value: object, name: str) -> list[str]:
    """Return one text or a list of texts as a list, without line ends around them.

    Null is an empty text, which may stand for itself; errors begin with `name`.
    """
    texts = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str | None):
            raise DataError(f"{name}: found {text!r:.60}; expected a text or a list of texts")
        texts.append(whole_characters(text or "", name).strip("\r\n"))
    return texts


def whole_characters(text: str, name: str) -> str:
    """Return a text unchanged, unless it holds half a character, as JSON can and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(f"{name}: {half!a} is half a character; expected whole ones") from error
    return text


def as_text(path: str | Path) -> str:
    r"""Return a path that may be written as UTF-8: other bytes are escaped, as `\xba`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def languages_of(tags: Iterable[str]) -> dict[str, str]:
    """Return the language of each tag: `zh` of `zh-CN` and `zh_Hant`, unless `zh` is there itself.

    Where it is, as in our own data, `zh-Hant` is a language apart. Other tags are unchanged.
    """
    tags = list(tags)
    bases = {tag: found[1] for tag in tags if (found := _WITH_REGION.fullmatch(tag))}
    return {tag: tag if bases.get(tag) in tags else bases.get(tag, tag) for tag in tags}


def quoted(names: Iterable[str]) -> str:
    """Join names for a message, each in quotes, or say that there are none."""
    return listed(f"{name!r:.60}" for name in names) or "none"


def listed(names: Iterable[str], most: int = 12, separator: str = ", ") -> str:
    """Join names for a message, and count those beyond `most`."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + rest


# Pages.


class _Page(HTMLParser):
    """Collects the running text of a page, with a mark wherever a paragraph may end."""

    BREAK = "\0"
    _INLINE = frozenset({
        "a", "abbr", "b", "bdi", "bdo", "big", "cite", "code", "data", "del", "dfn", "em", "font",
        "i", "ins", "kbd", "mark", "q", "s", "samp", "small", "span", "strong", "sub", "sup",
        "time", "tt", "u", "var", "wbr",
    })  # fmt: skip
    _WITHOUT_TEXT = frozenset({
        "title", "script", "style", "noscript", "template", "nav", "header", "footer", "aside",
    })  # fmt: skip

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0  # how many elements without text are open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in self._WITHOUT_TEXT
        self._break_unless_inline(tag)

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in self._WITHOUT_TEXT and self._hidden > 0
        self._break_unless_inline(tag)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)

    def _break_unless_inline(self, tag: str) -> None:
        if tag not in self._INLINE:
            self.parts.append(self.BREAK)
