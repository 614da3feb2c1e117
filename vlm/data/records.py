"""The records of a file, in a stream: text, pages, JSON lines, tar files; `tables` has the rest.

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
from contextlib import contextmanager
from functools import partial, wraps
from html.parser import HTMLParser
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast

import pyarrow
from webdataset.tariterators import base_plus_ext

from vlm.errors import DataError

BLOCK = 1 << 17
LONGEST = 1 << 26  # bytes of a line, cell or member: a file without line ends must not fill memory
_HEAD = 1 << 16
_LONGEST_END = 1 << 16  # bytes: six times what tar and Python's tarfile write at the most
DAMAGE = (
    OSError, EOFError, ValueError, OverflowError, RecursionError, zlib.error, tarfile.TarError,
    pyarrow.ArrowException,
)  # fmt: skip
"""What the readers of tars, tables and packed files raise on bytes that are not what they read."""

_REGION = r"(?:[-_](?i:hans|hant|latn|[a-z]{2}|[0-9]{3}))"  # or a script
LANGUAGE_TAG = rf"[a-z]{{2,3}}{_REGION}*"
_WITH_REGION = re.compile(rf"([a-z]{{2,3}}){_REGION}+")

_T = TypeVar("_T")
_P = ParamSpec("_P")
Advance = Callable[[int], object]
"""Called with a number of bytes each time some were read."""


class Member(NamedTuple):
    """One file of a sample in a tar."""

    start: int
    """Where it begins in the tar, unpacked."""
    size: int
    content: bytes
    """Of `.json` and `.txt`; empty for others, which are not read."""


_NO_BYTES = Member(0, 0, b"")


def ignore(_: int) -> None:
    """Do nothing with a number of bytes."""


def reader(
    read: Callable[Concatenate[Path, _P], Iterator[tuple[str, _T]]],
) -> Callable[Concatenate[Path, _P], Iterator[tuple[str, _T]]]:
    """Let what a reader trips over name the file, and the last place that could be read."""

    @wraps(read)
    def read_and_name(path: Path, *args: _P.args, **kwargs: _P.kwargs) -> Iterator[tuple[str, _T]]:
        place = ""
        try:
            for place, record in read(path, *args, **kwargs):
                yield place, record
        except DAMAGE as error:
            after = f" after {place}" if place else ""
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{path} cannot be read{after}: {reason}") from error

    return cast(Callable[Concatenate[Path, _P], Iterator[tuple[str, _T]]], read_and_name)


# Readers.


@reader
def lines_of(path: Path, *, advance: Advance = ignore) -> Iterator[tuple[str, str]]:
    """Give every line of a text file, blank ones too, without its end.

    Raises:
        DataError: as all readers here: the file is damaged, or not UTF-8; with the place.
    """
    with opened(path, advance) as file:
        for number, line in raw_lines(file, path):
            yield f"line {number}", line.rstrip("\r\n")


@reader
def paragraphs_of(path: Path, *, advance: Advance = ignore) -> Iterator[tuple[str, str]]:
    """Give the paragraphs, headings, items and cells of an HTML page, each with its space as one.

    Navigation, headers, footers, scripts and styles are left out. The page is read as a whole.
    """
    page = _Page()
    with opened(path, advance) as file:
        for _, line in raw_lines(file, path):
            page.feed(line)
    page.close()
    texts = (" ".join(part.split()) for part in "".join(page.parts).split(_Page.BREAK))
    for number, text in enumerate(filter(None, texts), start=1):
        yield f"paragraph {number}", text


@reader
def objects_of(path: Path, *, advance: Advance = ignore) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the object in every line of JSON that is not blank."""
    with opened(path, advance) as file:
        for number, line in raw_lines(file, path):
            if line.strip():
                yield f"line {number}", object_in(line, f"{path}, line {number}")


@reader
def samples_of(
    path: Path, *, advance: Advance = ignore
) -> Iterator[tuple[str, tuple[str, dict[str, Member]]]]:
    """Give the samples of a tar: a key, and its neighbouring members by extension in lower case.

    A key is the name up to the first dot of its last part. Folders and hidden files are left out.
    """
    with (
        opened(path, advance) as file,
        tarfile.open(fileobj=file, mode="r|", bufsize=BLOCK) as archive,
    ):
        for key, members in groupby(members_of(archive, path), key=itemgetter(0)):
            sample: dict[str, Member] = {}
            for _, extension, member in members:
                if extension in sample:
                    raise tarfile.ReadError(f"{key}.{extension} occurs twice")
                sample[extension] = member
            yield f"sample {key!r}", (key, sample)
        check_end(archive)


# What records hold.


def decoded(content: bytes, name: str) -> str:
    """Return text in UTF-8, without a byte order mark; errors begin with `name`."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(error, name) from error


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


def listed(names: Iterable[str], most: int = 12) -> str:
    """Join names for a message, and count those beyond `most`."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


# A glance at a file, to see what it is.


def first_line(path: Path) -> str:
    """Return the first line that is not blank, or nothing if it is not text or very long."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
        line = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0]
        return "" if len(line) == _HEAD else line.decode().rstrip("\r")
    except (OSError, UnicodeDecodeError):
        return ""


def first_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in the first line, or nothing if it is something else."""
    try:
        return object_in(first_line(path), "")
    except DataError:
        return {}


# Bytes and lines.


class _CountedFile(io.FileIO):
    """A file that tells how many bytes are read from it; to be read through a buffer."""

    def __init__(self, path: Path, advance: Advance) -> None:
        super().__init__(path, "r")
        self._advance = advance

    def readinto(self, buffer: Any) -> int:
        read = super().readinto(buffer) or 0
        self._advance(read)
        return read


@contextmanager
def opened(path: Path, advance: Advance) -> Iterator[io.BufferedIOBase]:
    """Open a file to read its bytes, unpacked if its name ends in `.gz`."""
    with _CountedFile(path, advance) as file, io.BufferedReader(file, BLOCK) as buffered:
        if path.name.lower().endswith(".gz"):
            with gzip.GzipFile(fileobj=buffered) as unpacked:
                yield unpacked
        else:
            yield buffered


def raw_lines(file: io.BufferedIOBase, path: Path) -> Iterator[tuple[int, str]]:
    """Give the lines with their ends, each as soon as it is there."""
    for number, line in enumerate(iter(partial(file.readline, LONGEST + 1), b""), start=1):
        if len(line) > LONGEST:
            raise DataError(f"{path}, line {number} is longer than {LONGEST} bytes")
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(error, f"{path}, line {number}") from error


def not_utf8(error: UnicodeDecodeError, name: str) -> DataError:
    """Word the error of text that is not UTF-8, which begins with `name`."""
    byte = error.object[error.start]
    return DataError(
        f"{name}: byte 0x{byte:02x} at {error.start} is not UTF-8 ({error.reason}); expected text "
        "in UTF-8"
    )


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


# Tar files.


def members_of(archive: tarfile.TarFile, path: Path) -> Iterator[tuple[str, str, Member]]:
    """Give key, extension in lower case and place of each file of a tar; json and txt are read."""
    for member in iter(archive.next, None):
        archive.members.clear()  # type: ignore[attr-defined] # it would grow with the tar
        if member.size < 0:  # the next header would be an earlier one, for ever
            raise tarfile.ReadError(f"{member.name} has the size {member.size}")
        key, extension = base_plus_ext(member.name)
        if key is None or member.isdir():
            continue
        if not member.isfile() or member.issparse():  # its bytes are elsewhere, or not in one piece
            yield key, f"{extension.lower()} (a link, device or file with holes)", _NO_BYTES
            continue
        content = b""
        if extension.lower() in ("json", "txt"):
            if member.size > LONGEST:
                raise DataError(f"{path}, member {member.name!r} is longer than {LONGEST} bytes")
            file = archive.extractfile(member)
            assert file is not None, "it is a file"
            content = file.read()
        yield key, extension.lower(), Member(member.offset_data, member.size, content)


def check_end(archive: tarfile.TarFile) -> None:
    """Read what follows the last member: the end of a tar is two blocks of zeros or more.

    tarfile by itself also takes a damaged header, or the end of the file, for the end.
    """
    assert archive.fileobj is not None, "it is open"
    zeros, damaged = 0, False
    for block in iter(partial(archive.fileobj.read, BLOCK), b""):
        zeros += len(block)
        damaged = damaged or bool(block.strip(b"\0"))
    # tarfile has read the first of the two blocks. Zeros without end were samples once: a disk that
    # loses power leaves them.
    if damaged or not tarfile.BLOCKSIZE <= zeros <= _LONGEST_END:
        raise tarfile.ReadError("it does not end as a tar file does; it is cut off or damaged")
