"""Tables of images and captions: CSV, TSV and Parquet, with a header, one or more rows an image.

The image is in a column `image`, `path` or the like. Captions are in `caption`, `text` or `title`,
or by language in `zh`, `en`, `caption_zh`, `text_de`, `caption_zh-CN` and so on, or in both.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from vlm.data.fields import CAPTION_FIELDS, caption_fields
from vlm.data.scanning import image_column, not_understood
from vlm.errors import DataError
from vlm.evaluation.config import RetrievalSource
from vlm.evaluation.retrieval.benchmarks.assembling import (
    Listing,
    Row,
    choose_split,
    listing_of_files,
    recognised_language,
)
from vlm.evaluation.retrieval.benchmarks.images import ImageFolder
from vlm.records.tables import columns_of, is_parquet, rows_of
from vlm.records.texts import quoted, texts_in

SUFFIXES = (".csv", ".tsv", ".txt", ".parquet")
_STEMS = tuple(f"{name}_" for name in CAPTION_FIELDS)


def is_table(path: Path) -> bool:
    """Say whether a path is such a table, or a folder with one; one with images in it is none."""
    return any(map(_names_images, _tables_in(path)))


def list_table(source: RetrievalSource) -> Listing:
    """List the images, which are files of a folder, and the captions of every column with some.

    Where there is a column `split`, only the rows of one are taken.
    """
    tables = _tables_in(source.file)
    if len(tables) > 1:
        several = ", ".join(table.name for table in tables)
        raise DataError(f"{source.file} has several tables: {several}; give one of them")
    if not tables:
        raise not_understood(source.file)
    path = tables[0]
    columns = columns_of(path)
    image, texts = image_column(columns), caption_fields(tuple(columns))
    wanted = [image, *texts, *({"split"} & set(columns))]
    records = list(rows_of(path, lambda _: wanted))
    splits = {str(record["split"]) for _, record in records} if "split" in columns else set()
    split = choose_split(splits, source.split, path)
    names: list[str] = []
    rows: list[tuple[str, Row]] = []
    for place, record in records:
        if splits and str(record["split"]) != split:
            continue
        name, where = record[image], f"{path}, {place}"
        if not isinstance(name, str):
            raise DataError(f"{where}: found {name!r:.40}; expected an image's path")
        names.append(name)
        for column, language in texts.items():
            of_cell = texts_in(record[column], where)
            rows += [(column, Row(text, (name,), place, language)) for text in of_cell]
    repeated, notes = _repeated_column(rows, texts, source)
    unread = [name for name in columns if name.startswith(_STEMS) and name not in texts]
    notes += [f"not read, as their names end in no language: {quoted(unread)}"] if unread else []
    return listing_of_files(
        dict.fromkeys(names),
        ImageFolder(source.images, path.parent),
        rows=[row for column, row in rows if column != repeated],
        split=split,
        notes=notes,
    )


def _repeated_column(
    rows: Sequence[tuple[str, Row]], texts: Mapping[str, str], source: RetrievalSource
) -> tuple[str | None, list[str]]:
    """Return the column without a language if another is in its language, and a note of it."""
    named = {language: column for column, language in texts.items() if language}
    unnamed = next((column for column, language in texts.items() if not language), None)
    if unnamed is None or not named:
        return None, []
    language = source.language
    if not language:
        captions = (row.text for column, row in rows if column == unnamed)
        language, _ = recognised_language(captions, unnamed)
    if language not in named:
        return None, []
    return unnamed, [f"{unnamed!r} is not read: it is in {language}, as {named[language]!r} is"]


def _names_images(table: Path) -> bool:
    if not is_parquet(table):
        return True
    schema = pyarrow.parquet.read_schema(table)
    kind = schema.field(image_column(schema.names)).type
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _tables_in(path: Path) -> Sequence[Path]:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    columns = {file: columns_of(file) for file in files}
    return [file for file, of in columns.items() if image_column(of) and caption_fields(tuple(of))]
