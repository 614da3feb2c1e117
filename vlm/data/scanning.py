"""What is in a tar, a table or a folder of images, sample by sample: rows of an index."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from vlm.data.config import SourceConfig
from vlm.data.fields import CAPTION_FIELDS, caption_fields, parts_of, value_at
from vlm.data.image_folder import IMAGE_SUFFIXES
from vlm.errors import DataError
from vlm.files import lines_in, read_file
from vlm.images.decoding import MAX_BYTES
from vlm.records.tables import IMAGE_COLUMNS, columns_of, rows_of
from vlm.records.tars import TAR_SUFFIXES, Content, Member, bytes_in, members_by_key
from vlm.records.texts import (
    LONGEST,
    Advance,
    as_text,
    decoded,
    ignore,
    object_in,
    objects_of,
    quoted,
    whole_characters,
)

Row = dict[str, Any]
"""One sample but for the bytes of an image that lies elsewhere, by the columns of an index."""

SIDE_SUFFIXES = (".txt", ".json")
IMAGE_EXTENSIONS = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
_OWN_COLUMNS = ("concept", "source", "licence", "labels")
_FIRST = 100  # rows of a table: where none of their images is there, the folder is wrong


def scan_tar(path: Path, config: SourceConfig, *, prefix: str = "") -> list[Row]:
    """Find the samples of a `.tar` or `.tar.gz`; a sample that cannot be used says why.

    Args:
        path: The tar; a plain one is mapped into memory, and its images are not read.
        config: The source.
        prefix: What stands before a key to make it the sample's uid.

    Raises:
        ShardError: the tar cannot be read to its end, or a member is there twice.
    """
    content, samples = members_by_key(path)
    rows: list[Row] = []
    for key, members in samples.items():
        where = f"{path}, sample {key!r}"
        rows.append(row := {"uid": as_text(f"{prefix}{key}")})
        with _fault_in(row):
            images = [members[name] for name in IMAGE_EXTENSIONS & members.keys()]
            record = record_in(content, members, where)
            if len(images) != 1 or not record:
                has = ", ".join(sorted(members))
                raise DataError(f"{where} needs one image and a .json or .txt, has {has}")
            if images[0].size > MAX_BYTES:
                raise DataError(f"{where} has an image of {images[0].size} bytes")
            row |= images[0]._asdict() | parts_of(record, config, name=row["uid"], where=where)
    return rows


def record_in(content: Content, members: Mapping[str, Member], where: str) -> dict[str, Any]:
    """Return what the `.json` and `.txt` of a sample in a tar say; errors begin with `where`."""
    texts = {name: members[name] for name in ("json", "txt") if name in members}
    for name, member in texts.items():
        if member.size > LONGEST:
            raise DataError(f"{where}, its .{name} is longer than {LONGEST} bytes")
    return _record_of({name: bytes_in(content, *member) for name, member in texts.items()}, where)


@contextmanager
def _fault_in(row: Row) -> Iterator[None]:
    """Keep in a row why its sample cannot be used."""
    try:
        yield
    except DataError as error:
        row["error"] = str(error)


def scan_images(paths: Iterable[Path], folder: Path, config: SourceConfig) -> Iterator[Row]:
    """Give the images of a folder, each with what its `.txt` and `.json` of the same name say."""
    for path in paths:
        uid, where = as_text(path.relative_to(folder)), str(path)
        row: Row = {"uid": uid, "path": os.fsencode(path.absolute())}
        with _fault_in(row):
            record = _record_next_to(path)
            if not record:
                raise DataError(f"{where} has no caption: found no .txt or .json of its name")
            row |= parts_of(record, config, name=uid, where=where)
        yield row


def _record_next_to(image: Path) -> dict[str, Any]:
    files = [image.with_suffix(suffix) for suffix in SIDE_SUFFIXES]
    try:
        texts = {file.suffix[1:]: read_file(file, LONGEST) for file in files if file.exists()}
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    return _record_of(texts, str(image))


def _record_of(texts: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """Return the object in a `.json` as `json`, and the lines of a `.txt` as `txt`."""
    record: dict[str, Any] = {}
    if "json" in texts:
        place = f"{where}, its .json"
        record["json"] = object_in(decoded(texts["json"], place), place)
    if "txt" in texts:
        record["txt"] = lines_in(decoded(texts["txt"], f"{where}, its .txt"))
    return record


def scan_table(path: Path, config: SourceConfig, *, prefix: str = "") -> Iterator[Row]:
    """Give the rows of a table of images or their paths, with their captions.

    Args:
        path: A csv, tsv, jsonl or parquet file.
        config: The source.
        prefix: What stands before a row's number, from 0, to make it the sample's uid.

    Raises:
        DataError: a row cannot be read, a column is missing, or none of the first images is there.
    """
    folder = config.images or path.parent
    if not folder.is_dir():
        raise DataError(f"images is {folder}, which is no folder; expected the one with the images")
    rows = _table_rows(path, config, folder, prefix)
    first = list(islice(rows, _FIRST))
    images = [Path(os.fsdecode(row["path"])) for row in first if "path" in row]
    if images and not any(map(os.path.isfile, images)):
        raise DataError(
            f"{path}: of its first {len(images)} images none is there, such as {images[0]}; "
            "expected `images`, the folder that their paths start from"
        )
    return chain(first, rows)


def _table_rows(path: Path, config: SourceConfig, folder: Path, prefix: str) -> Iterator[Row]:
    for number, (where, record) in enumerate(records_in(path, (), config)):
        row: Row = {"uid": f"{prefix}{number}"}
        with _fault_in(row):
            row["split"] = whole_characters(str(record.get("split") or ""), where)
            name, value = row["uid"], image_in(record, config)
            if isinstance(value, bytes):
                row["image"] = value
            elif isinstance(value, str) and value:
                name = whole_characters(value, where)
                if "://" in name:
                    raise DataError(
                        f"{where}: {name:.80} is a URL, and images are not fetched one by one; "
                        "expected a file, or tars such as img2dataset makes"
                    )
                row["path"] = os.fsencode((folder / name).absolute())
            else:
                raise DataError(f"{where}: found {value!r:.40}; expected an image or its path")
            row |= parts_of(record, config, name=name, where=where)
        yield row


def image_in(record: Mapping[str, Any], config: SourceConfig) -> Any:
    """Return the image of a row, or its path."""
    value = value_at(record, config.image or image_column(record))
    if isinstance(value, Mapping):  # as Hugging Face's datasets write images
        value = value.get("bytes") or value.get("path")
    return value


def first_record(path: Path, images: Iterable[Path], config: SourceConfig) -> Mapping[str, Any]:
    """Return the first record of a tar, a table, or some images of a folder."""
    return next((record for _, record in records_in(path, images, config) if record), {})


def records_in(
    path: Path,
    images: Iterable[Path],
    config: SourceConfig,
    *,
    with_images: bool = True,
    advance: Advance = ignore,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the records of a tar, a table, or some images of a folder, each after where it is.

    Of a table the fields of the source are read, those of images only `with_images`; `advance` is
    called with the bytes. A `DataError` says what cannot be read, or which column is missing.
    """
    if images:
        yield from ((str(image), _record_next_to(image)) for image in images)
    elif path.name.lower().endswith(TAR_SUFFIXES):
        content, samples = members_by_key(path)
        for key, members in samples.items():
            where = f"{path}, sample {key!r}"
            yield where, record_in(content, members, where)
    else:
        rows = (
            objects_of(path, advance=advance)
            if is_json_lines(path)
            else rows_of(path, lambda of: _columns(of, config, path, with_images), advance=advance)
        )
        yield from ((f"{path}, {place}", record) for place, record in rows)


def _columns(
    columns: Sequence[str], config: SourceConfig, path: Path, with_images: bool
) -> Sequence[str]:
    """Choose the columns of a table that are read."""
    needed = [*chain.from_iterable(config.captions.values()), *config.language_of]
    needed = needed or list({"captions"} & set(columns) or caption_fields(tuple(columns)))
    image = config.image or image_column(columns)
    if not needed or (with_images and not image):
        raise not_understood(path)
    if with_images:
        needed += filter(None, (image, config.concept))
    missing = [name for name in needed if not {name, name.partition(".")[0]} & set(columns)]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}; its columns are {quoted(columns)}")
    wanted = {*needed, *(name.partition(".")[0] for name in needed), "captions", "split"}
    wanted |= set(_OWN_COLUMNS) if with_images else set()
    return [name for name in columns if name in wanted]


def not_understood(path: Path) -> DataError:
    """Say which columns a table has, and which it needs."""
    return DataError(
        f"{path} has the columns {quoted(columns_of(path))}; expected one of images, such as "
        f"{' or '.join(IMAGE_COLUMNS[:3])}, unless captions alone are read, and one of captions, "
        f"such as {' or '.join(CAPTION_FIELDS)} or, by language, caption_zh"
    )


def image_column(columns: Iterable[str]) -> str:
    """Return the column of images by its name, or an empty string."""
    columns = set(columns)
    return next((name for name in IMAGE_COLUMNS if name in columns), "")


def is_json_lines(path: Path) -> bool:
    """Say whether a file has the name of JSON lines."""
    return path.name.lower().removesuffix(".gz").endswith(".jsonl")
