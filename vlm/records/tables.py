"""Tables with a header, row by row: Parquet, and text separated by commas or tabs."""

import csv
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import pyarrow
import pyarrow.parquet

from vlm.errors import DataError
from vlm.records.texts import (
    BLOCK,
    LONGEST,
    Advance,
    first_line,
    guarded,
    ignore,
    raw_lines,
)

IMAGE_COLUMNS = (
    "image", "path", "filename", "filepath", "file_name", "image_path", "image_name", "file",
)  # fmt: skip
_ROWS = 1024  # of a Parquet file at a time


def rows_of(
    path: Path,
    choose: Callable[[Sequence[str]], Sequence[str]] = lambda columns: columns,
    *,
    advance: Advance = ignore,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the rows of a Parquet file or of a table with a header, as cells by column.

    Tables are separated by tabs if their name or header says so, else by commas. Cells may be
    quoted as in RFC 4180. In tables of tabs, and in those of an image and its caption alone, which
    often quote nothing, a quotation mark is a character of the cell unless it is quoted whole.
    `choose` is given all columns and returns those to read.
    """
    rows = _parquet_rows if is_parquet(path) else _text_rows
    return guarded(path, rows(path, choose, advance))


def columns_of(path: Path) -> Sequence[str]:
    """Return the columns of a file if it is a table, else whatever its first line holds."""
    if not path.is_file():
        return ()
    try:
        if is_parquet(path):
            return cast(list[str], pyarrow.parquet.read_schema(path).names)
        line = first_line(path)
        return next(csv.reader([line], delimiter=_delimiter(path, line)), [])
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException):
        return ()


def is_parquet(path: Path) -> bool:
    """Say whether a file has Parquet's name or first bytes; a pipe is not looked into."""
    if path.suffix.lower() == ".parquet" or not path.is_file():
        return path.suffix.lower() == ".parquet"
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _parquet_rows(
    path: Path, choose: Callable[[Sequence[str]], Sequence[str]], advance: Advance
) -> Iterator[tuple[str, dict[str, Any]]]:
    size, number = path.stat().st_size, 0
    with pyarrow.parquet.ParquetFile(
        path, buffer_size=BLOCK, pre_buffer=False, page_checksum_verification=True
    ) as file:
        # The first page of every column shows if one that is not chosen has a damaged name.
        next(file.iter_batches(1, use_threads=False), None)
        _check_columns(file.metadata, file.schema_arrow.names, 1)
        columns = list(choose(file.schema_arrow.names))
        rows = file.metadata.num_rows
        for batch in file.iter_batches(_ROWS, columns=columns, use_threads=False):
            for cells in zip(*batch.columns, strict=True):
                number += 1
                values = [cell.as_py() for cell in cells]
                yield f"row {number}", dict(zip(batch.schema.names, values, strict=True))
            advance(size * len(batch) // rows)
        _check_columns(file.metadata, columns, file.num_row_groups)
        if number != rows:
            raise ValueError(f"found {number} rows, its footer says {rows}")


def _check_columns(footer: Any, names: Collection[str], groups: int) -> None:
    """Refuse a footer in which a column has the name or pages of another: it has no checksum.

    Only of columns that were read: on what else a damaged footer says, pyarrow ends the process.
    """
    schema, starts = footer.schema, set()
    paths = {number: schema.column(number).path for number in range(len(schema))}
    for group in map(footer.row_group, range(min(groups, footer.num_row_groups))):
        for number, path in paths.items():
            if path.partition(".")[0] not in names:
                continue
            column = group.column(number)
            start = column.dictionary_page_offset or column.data_page_offset
            if column.path_in_schema != path or (start in starts and group.num_rows):
                raise ValueError(f"its footer has another column in the place of {path!r}")
            starts.add(start)


def _text_rows(
    path: Path, choose: Callable[[Sequence[str]], Sequence[str]], advance: Advance
) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    table = _TextTable(path, raw_lines(path, advance))
    places = {name: table.header.index(name) for name in choose(table.header)}
    for place, cells in table:
        yield place, {name: cells[position] for name, position in places.items()}


class _TextTable:
    """Splits lines into the cells of rows."""

    def __init__(self, path: Path, lines: Iterator[tuple[str, str]]) -> None:
        self._path, self._lines = path, lines
        self._ahead: deque[tuple[str, str]] = deque()  # lines looked at and not yet taken
        place, first = next(lines, ("line 1", ""))
        self._delimiter = _delimiter(path, first)
        self.header = self._quoted_cells(place, [first])
        if twice := [name for name in self.header if self.header.count(name) > 1]:
            raise DataError(f"{path} has the column {twice[0]!r} twice; expected each once")
        tabs = self._delimiter == "\t"
        pairs = len(self.header) == 2 and self.header[0] in IMAGE_COLUMNS
        self._splits = 1 if pairs and not tabs else -1
        self._may_be_unquoted = tabs or pairs

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        while taken := self._take():
            place, line = taken
            if line.strip("\r\n"):
                cells = (self._may_be_unquoted and self._cells_of_line(line)) or self._quoted_cells(
                    place, chain([line], map(itemgetter(1), iter(self._take, None)))
                )
                if len(cells) != len(self.header):
                    raise DataError(
                        f"{self._path}, {place}: found {len(cells)} cells; expected "
                        f"{len(self.header)} as in the header"
                    )
                yield place, cells

    def _take(self) -> tuple[str, str] | None:
        return self._ahead.popleft() if self._ahead else next(self._lines, None)

    def _quoted_cells(self, place: str, lines: Iterable[str]) -> list[str]:
        """Return the cells of the first line, and of those after it that are in quotes."""
        try:
            return self._split(lines)
        except csv.Error as error:
            reason = str(error).replace("\t", r"\t")
            raise DataError(
                f"{self._path}, {place}: {reason}; expected a table with quotes as in RFC 4180"
            ) from error

    def _split(self, lines: Iterable[str]) -> list[str]:
        return next(csv.reader(lines, delimiter=self._delimiter, strict=True), [])

    def _cells_of_line(self, line: str) -> list[str] | None:
        """Return the cells of a line where quotes may mean nothing, if it is a row by itself.

        It is not where an open quote goes on in the next line, unless that is a row by itself too:
        else one open quote would swallow the rows after it.
        """
        plain = self._plain_cells(line)
        try:
            cells = self._split([line])
            return cells if len(cells) == len(self.header) else plain
        except csv.Error as error:
            goes_on = "end of data" in str(error) and plain and not self._a_row_follows(plain)
            return None if goes_on else plain

    def _plain_cells(self, line: str) -> list[str] | None:
        """Return the cells of a line in which quotes mean nothing, if they are those of a row."""
        cells = line.rstrip("\r\n").split(self._delimiter, self._splits)
        return cells if len(cells) == len(self.header) else None

    def _a_row_follows(self, row: Sequence[str]) -> bool:
        """Look at the next line that is not blank; at the end, nothing closes a quote either."""
        while not self._ahead or not self._ahead[-1][1].strip("\r\n"):
            more = next(self._lines, None)
            if more is None:
                return True
            self._ahead.append(more)
        cells = self._plain_cells(self._ahead[-1][1])
        # In a table of commas any line with one has two cells; a row names an image as well.
        return cells is not None and (
            self._delimiter == "\t" or Path(cells[0]).suffix == Path(row[0]).suffix
        )


def _delimiter(path: Path, header: str) -> str:
    return "\t" if "\t" in header or ".tsv" in path.name.lower() else ","
