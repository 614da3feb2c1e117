"""Files of captions by their suffix: text, tables, JSON lines, pages and shards, in a stream."""

import csv
import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow
import pyarrow.parquet
from webdataset.tariterators import base_plus_ext

from vlm.data.pages import paragraphs_of
from vlm.errors import TokenizerError

_BLOCK = 1 << 17
_LONGEST = 1 << 26  # bytes of a line, cell or member: a file without line ends must not fill memory
_ROWS = 1024
_ANY_LANGUAGE = ("caption", "text")
DAMAGE = (
    OSError, EOFError, ValueError, zlib.error, tarfile.TarError, pyarrow.ArrowException,
)  # fmt: skip


@dataclass(kw_only=True, slots=True)
class Reading:
    """What is wanted of one file, and the place that its reader has reached."""

    path: Path
    size: int
    language: str
    column: str
    advance: Callable[[int], object]
    """Told the number of bytes each time some were read."""
    unit: str = "line"
    place: int | str = 0

    def __str__(self) -> str:
        return f"{self.path}, {self.unit} {self.place}" if self.place else str(self.path)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns or keys that may hold the captions, the best first."""
        language = self.language
        return (self.column,) if self.column else (language, f"caption_{language}", *_ANY_LANGUAGE)


def suffix_of(path: Path) -> str:
    """Return the suffix in small letters, that of a packed file with its `.gz`."""
    name = path.name.lower()
    packed = ".gz" if name.endswith(".gz") else ""
    return Path(name.removesuffix(packed)).suffix + packed


# Bytes and lines.


class _CountedFile(io.FileIO):
    """A file that tells how many bytes are read from it; to be read through a buffer."""

    def __init__(self, path: Path, advance: Callable[[int], object]) -> None:
        super().__init__(path, "r")
        self._advance = advance

    def readinto(self, buffer: Any) -> int:
        read = super().readinto(buffer) or 0
        self._advance(read)
        return read


@contextmanager
def _opened(reading: Reading) -> Iterator[BinaryIO]:
    with (
        _CountedFile(reading.path, reading.advance) as file,
        io.BufferedReader(file, _BLOCK) as buffered,
    ):
        if reading.path.name.lower().endswith(".gz"):
            with gzip.GzipFile(fileobj=buffered) as unpacked:
                yield cast(BinaryIO, unpacked)
        else:
            yield buffered


def _lines(reading: Reading) -> Iterator[str]:
    """Give the lines with their ends, each as soon as it is there."""
    with _opened(reading) as file:
        for number, line in enumerate(iter(partial(file.readline, _LONGEST + 1), b""), start=1):
            reading.place = number
            if len(line) > _LONGEST:
                raise TokenizerError(f"{reading} is longer than {_LONGEST} bytes")
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")


# The readers by suffix.


def _read_text(reading: Reading) -> Iterator[str]:
    for line in _lines(reading):
        yield from _texts(line.rstrip("\r\n"), reading)


def _read_csv(reading: Reading, *, delimiter: str) -> Iterator[str]:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST))
    rows = csv.reader(_lines(reading), delimiter=delimiter, strict=True)
    header = next(rows, [])
    place = header.index(_column_of(header, reading))
    for row in rows:
        if row and len(row) != len(header):
            raise TokenizerError(
                f"{reading}: found {len(row)} cells; expected {len(header)} as in the header"
            )
        if row:
            yield from _texts(row[place], reading)


def _read_parquet(reading: Reading) -> Iterator[str]:
    reading.unit = "row"
    with pyarrow.parquet.ParquetFile(
        reading.path, buffer_size=_BLOCK, pre_buffer=False, page_checksum_verification=True
    ) as file:
        column = _column_of(file.schema_arrow.names, reading)
        rows = file.metadata.num_rows
        for batch in file.iter_batches(_ROWS, columns=[column], use_threads=False):
            for number, cell in enumerate(batch.column(0), start=int(reading.place) + 1):
                reading.place = number
                yield from _texts(cell.as_py(), reading)
            reading.advance(reading.size * len(batch) // rows)


def _read_json_lines(reading: Reading) -> Iterator[str]:
    captioned = False
    others: Collection[str] = ()
    for line in _lines(reading):
        if not line.strip():
            continue
        record = _record_from(line, reading)
        name = _name_in(record, reading)
        if name is not None:
            captioned = True
            yield from _texts(record[name], reading)
        others = others or list(record)
    if others and not captioned:
        raise TokenizerError(
            f"{reading.path}: no record names captions; expected {_expected(reading)} or "
            f"'captions' by language, the first record has {_quoted(others)}"
        )


def _read_page(reading: Reading) -> Iterator[str]:
    for paragraph in paragraphs_of("".join(_lines(reading))):
        yield from _texts(paragraph, reading)


def _read_shard(reading: Reading) -> Iterator[str]:
    reading.unit = "member"
    captioned = False
    others = ""
    with (
        _opened(reading) as file,
        tarfile.open(fileobj=file, mode="r|", bufsize=_BLOCK) as archive,
    ):
        for _, members in groupby(_members(archive, reading), key=attrgetter("key")):
            sample = list(members)
            texts = _texts_of_sample(sample, reading)
            if texts is not None:
                captioned = True
                yield from texts
            others = others or listed(f".{member.extension}" for member in sample)
        _check_end(archive)
    if others and not captioned:
        raise TokenizerError(
            f"{reading.path}: no sample has captions; expected .txt members or .json records with "
            f"{_expected(reading)} or 'captions' by language, the first sample has {others}"
        )


_PACKABLE: Mapping[str, Callable[[Reading], Iterator[str]]] = {
    ".txt": _read_text,
    ".csv": partial(_read_csv, delimiter=","),
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".jsonl": _read_json_lines,
    ".html": _read_page,
    ".tar": _read_shard,
}
READERS: Mapping[str, Callable[[Reading], Iterator[str]]] = {
    **{suffix + gz: reader for suffix, reader in _PACKABLE.items() for gz in ("", ".gz")},
    ".parquet": _read_parquet,
}
SHARD_SUFFIXES = (".tar", ".tar.gz")


# Columns, records and what they hold.


def _column_of(columns: Sequence[str], reading: Reading) -> str:
    for name in reading.names:
        if name in columns:
            return name
    raise TokenizerError(
        f"{reading.path} has no column {_expected(reading)}; its columns are {_quoted(columns)}"
    )


def _name_in(record: Mapping[str, object], reading: Reading) -> str | None:
    """Return the key of a record's captions, if it has any."""
    if isinstance(record.get("captions"), dict) and reading.column not in record:
        return "captions"
    return next((name for name in reading.names if name in record), None)


def _record_from(text: str, reading: Reading) -> dict[str, object]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{reading} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise TokenizerError(f"{reading} is a JSON {type(record).__name__}; expected an object")
    return record


def _texts(value: object, reading: Reading) -> list[str]:
    """Return the captions in a cell or record: a text, several, or several by language."""
    if isinstance(value, dict):
        value = value.get(reading.language)
    texts: list[str] = []
    for text in value if isinstance(value, list) else (value,):
        if text is None:
            continue
        if not isinstance(text, str):
            raise TokenizerError(f"{reading}: found {text!r:.60}; expected a text or several")
        text.encode()  # JSON can hold halves of characters, which no tokenizer can read
        if text.strip():
            texts.append(text)
    return texts


def _expected(reading: Reading) -> str:
    return " or ".join(repr(name) for name in reading.names)


def _quoted(names: Iterable[str]) -> str:
    return listed(f"{name!r:.60}" for name in names) or "none"


def listed(names: Iterable[str], most: int = 12) -> str:
    """Join names for a message, and count what would make it too long."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


# Shards.


@dataclass(frozen=True, slots=True)
class _Member:
    key: str
    name: str
    extension: str
    content: bytes
    """Empty where it is neither a record nor a text."""


def _members(archive: tarfile.TarFile, reading: Reading) -> Iterator[_Member]:
    for member in iter(archive.next, None):
        archive.members.clear()  # type: ignore[attr-defined] # it would grow with the shard
        key, extension = base_plus_ext(member.name)
        if key is None or not member.isfile():
            continue
        content = b""
        if extension.lower() in ("json", "txt"):
            if member.size > _LONGEST:
                raise TokenizerError(
                    f"{reading.path}, member {member.name!r} is longer than {_LONGEST} bytes"
                )
            file = archive.extractfile(member)
            assert file is not None, "it is a file"
            content = file.read()
        reading.place = repr(member.name)
        yield _Member(key, member.name, extension.lower(), content)


def _texts_of_sample(sample: Sequence[_Member], reading: Reading) -> list[str] | None:
    """Return a sample's captions in the language, or nothing if it names none in any."""
    captions: list[str] | None = None
    for extension in ("json", "txt"):
        for member in sample:
            if member.extension != extension:
                continue
            reading.place = repr(member.name)
            text = member.content.decode("utf-8-sig")
            if extension == "txt":
                captions = (captions or []) + _texts(text.rstrip("\r\n"), reading)
                continue
            record = _record_from(text, reading)
            name = _name_in(record, reading)
            if name is not None:
                captions = (captions or []) + _texts(record[name], reading)
        if captions is not None:
            return captions
    return None


def _check_end(archive: tarfile.TarFile) -> None:
    """Read what follows the last member: the end of a tar is two blocks of zeros or more.

    tarfile by itself also takes a damaged header, or the end of the file, for the end.
    """
    assert archive.fileobj is not None, "it is open"
    zeros, damaged = 0, False
    for block in iter(partial(archive.fileobj.read, _BLOCK), b""):
        zeros += len(block)
        damaged = damaged or bool(block.strip(b"\0"))
    if damaged or zeros < tarfile.BLOCKSIZE:  # the first of the two is read
        raise tarfile.ReadError("it does not end as a tar file does; it is cut off or damaged")
