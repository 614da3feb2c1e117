"""Tables of images and captions: CSV, TSV and parquet, with a header, one or more rows an image.

The image is in a column `image`, `path` or the like; the captions are in `caption`, `text` or
`title`, or by language in `zh`, `en`, `caption_zh`, `text_de` and so on. CLIP_benchmark's files
with `image,caption` leave commas in captions unquoted: in a table of two columns, the second is all
that follows.
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from vlm.errors import DataError
from vlm.evaluation.retrieval.benchmarks.assembling import Listing, Request, Row, listing_of_files
from vlm.evaluation.retrieval.benchmarks.images import ImageFolder
from vlm.evaluation.retrieval.benchmarks.lines import choose_split, first_line, texts_in

_IMAGES = (
    "image", "path", "filename", "filepath", "file_name", "image_path", "image_name", "file",
)  # fmt: skip
_TEXTS = ("caption", "text", "title")
_OF_LANGUAGE = re.compile(rf"(?:{'|'.join(_TEXTS)})_([a-z]{{2,3}})|(zh|en)")
_SUFFIXES = (".csv", ".tsv", ".txt", ".parquet")
_ROWS = 1024


def is_table(path: Path) -> bool:
    """Say whether a path is such a table, or a folder with one."""
    return bool(_tables_in(path))


def list_table(request: Request) -> Listing:
    """List the images, which are files of a folder, and the captions of every column with some.

    Where there is a column `split`, only the rows of one are taken.

    Raises:
        DataError: the folder has several tables, or a row is damaged.
    """
    tables = _tables_in(request.path)
    if len(tables) != 1:
        several = ", ".join(table.name for table in tables)
        raise DataError(f"{request.path} has several tables: {several}; give one of them")
    path = tables[0]
    columns = _columns(path)
    image, texts = _roles(columns)
    wanted = [image, *texts, *({"split"} & set(columns))]
    records = list(_records_of(path, wanted))
    splits = {str(record["split"]) for _, record in records} if "split" in columns else set()
    split = choose_split(splits, request.split, path)
    names: list[str] = []
    rows: list[Row] = []
    for number, record in records:
        if splits and str(record["split"]) != split:
            continue
        name = record[image]
        if not isinstance(name, str):
            raise DataError(f"{path}, row {number}: found {name!r:.40}; expected an image's path")
        names.append(name)
        for column, language in texts.items():
            value = record[column]
            of_cell = texts_in(value if value is not None else "", f"{path}, row {number}")
            rows += [Row(text, (name,), number, language) for text in of_cell]
    folder = ImageFolder(request.images, path.parent)
    return listing_of_files(
        dict.fromkeys(names), folder, rows=rows, files=(path,), split=split, unit="row"
    )


def _tables_in(path: Path) -> Sequence[Path]:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
    return [file for file in files if all(_roles(_columns(file)))]


def _roles(columns: Sequence[str]) -> tuple[str, Mapping[str, str]]:
    """Return the column of images, and those of captions with their languages ('' if untold)."""
    image = next((name for name in _IMAGES if name in columns), "")
    texts = {}
    for column in columns:
        of_language = _OF_LANGUAGE.fullmatch(column)
        if of_language:
            texts[column] = of_language[1] or of_language[2]
    if not texts:
        texts = {name: "" for name in _TEXTS if name in columns}
        texts = dict(list(texts.items())[:1])  # a title beside a caption is not another caption
    return image, texts


def _columns(path: Path) -> Sequence[str]:
    if not path.is_file():
        return ()
    if _is_parquet(path):
        try:
            names: list[str] = pyarrow.parquet.read_schema(path).names
        except pyarrow.ArrowException:
            return ()
        return names
    line = first_line(path)
    header: list[str] = next(csv.reader([line], delimiter=_delimiter(line)), [])
    return header


def _records_of(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Give the rows' cells of some columns, with the rows' numbers from 1 without the header."""
    try:
        if _is_parquet(path):
            with pyarrow.parquet.ParquetFile(path) as file:
                batches = (b.to_pylist() for b in file.iter_batches(_ROWS, columns=columns))
                yield from enumerate(chain.from_iterable(batches), start=1)
        else:
            yield from _csv_rows(path)
    except (csv.Error, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    delimiter = _delimiter(first_line(path))
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.reader(file, delimiter=delimiter)
        header = next(table)
        for number, row in enumerate(filter(None, table), start=1):
            unquoted = len(header) == 2 < len(row) and header[0] in _IMAGES
            cells = [row[0], delimiter.join(row[1:])] if unquoted else row
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, row {number} has {len(cells)} cells; expected {len(header)} as in "
                    "the header"
                )
            yield number, dict(zip(header, cells, strict=True))


def _delimiter(line: str) -> str:
    return "\t" if "\t" in line else ","


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"
