"""What is in a tar, a table or a folder of images, sample by sample: rows of an index."""

import gzip
import io
import mmap
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from vlm.data.config import SourceConfig
from vlm.data.fields import CAPTION_FIELDS, caption_fields, parts_of, value_at
from vlm.data.image_folder import IMAGE_SUFFIXES
from vlm.data.records import (
    BLOCK,
    DAMAGE,
    LONGEST,
    Member,
    as_text,
    check_end,
    decoded,
    members_of,
    object_in,
    objects_of,
    quoted,
    samples_of,
    whole_characters,
)
from vlm.data.tables import IMAGE_COLUMNS, columns_of, rows_of
from vlm.errors import DataError, ShardError
from vlm.files import lines_in, read_file
from vlm.images.decoding import MAX_BYTES

Row = dict[str, Any]
"""One sample but for the bytes of an image that lies elsewhere, by the columns of an index."""

TAR_SUFFIXES = (".tar", ".tar.gz")
SIDE_SUFFIXES = (".txt", ".json")
IMAGE_EXTENSIONS = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
_OWN_COLUMNS = ("captions", "concept", "source", "licence", "labels", "split")
# Shards of small images unpack to a few times their size, zeros to a thousand times.
_LARGEST_RATIO = 50
_LITTLE = 1 << 25  # bytes that may come of anything
_FIRST = 100  # rows of a table: where none of their images is there, the folder is wrong


class ScannedTar(NamedTuple):
    """A tar, looked through from its beginning to its end."""

    content: bytes | mmap.mmap
    """The bytes, unpacked, in which rows have the places of images."""
    rows: list[Row]


def scan_tar(path: Path, config: SourceConfig, *, prefix: str = "") -> ScannedTar:
    """Find the samples of a `.tar` or `.tar.gz`; a sample that cannot be used says why.

    Args:
        path: The tar; a plain one is mapped into memory, and its images are not read.
        config: The source.
        prefix: What stands before a key to make it the sample's uid.

    Raises:
        ShardError: the tar cannot be read to its end, or a member is there twice.
    """
    content, samples = members_by_key(path)
    rows = [
        _tar_row(key, members, config, where=f"{path}, sample {key!r}", prefix=prefix)
        for key, members in samples.items()
    ]
    return ScannedTar(content, rows)


def members_by_key(path: Path) -> tuple[bytes | mmap.mmap, dict[str, dict[str, Member]]]:
    """Return the bytes of a tar, unpacked, and its members by key and extension.

    Members of one key need not be neighbours. Errors as in `scan_tar`.
    """
    samples: dict[str, dict[str, Member]] = {}
    content = tar_content(path)
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for key, extension, member in members_of(archive, path):
                if extension in samples.setdefault(key, {}):
                    raise tarfile.ReadError(f"{key}.{extension} occurs twice")
                samples[key][extension] = member
            check_end(archive)
    except DAMAGE as error:
        raise ShardError(f"shard {path} cannot be read: {error}") from error
    return content, samples


def tar_content(path: Path) -> bytes | mmap.mmap:
    """Return a tar's bytes, unpacked; those of a plain one are not read before they are asked for.

    Raises:
        ShardError: they cannot be read.
    """
    try:
        if path.name.lower().endswith(".gz"):
            return _unpacked(path)
        with path.open("rb") as file:
            if path.stat().st_size == 0:  # an empty file cannot be mapped
                return b""
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # Samples come in random order: by itself the system reads megabytes around each.
            content.madvise(mmap.MADV_RANDOM)
            return content
    except DAMAGE as error:
        raise ShardError(f"shard {path} cannot be read: {error}") from error


def bytes_in(content: bytes | mmap.mmap, start: int, size: int) -> bytes:
    """Return some bytes of a tar; those of a mapped one are read at once, not page by page."""
    if isinstance(content, mmap.mmap) and size:
        page = start - start % mmap.PAGESIZE
        content.madvise(mmap.MADV_WILLNEED, page, start + size - page)
    return bytes(content[start : start + size])


def _unpacked(path: Path) -> bytes:
    blocks, size = [], 0
    with path.open("rb") as packed, gzip.GzipFile(fileobj=packed) as unpacked:
        for block in iter(partial(unpacked.read, BLOCK), b""):
            blocks.append(block)
            size += len(block)
            if size > _LITTLE + _LARGEST_RATIO * packed.tell():
                raise EOFError(
                    f"its first {packed.tell()} bytes unpack to more than {size}; expected a tar "
                    "of images"
                )
    return b"".join(blocks)


def _tar_row(
    key: str, members: Mapping[str, Member], config: SourceConfig, *, where: str, prefix: str
) -> Row:
    row: Row = {"uid": as_text(f"{prefix}{key}")}
    images = [member for extension, member in members.items() if extension in IMAGE_EXTENSIONS]
    texts = {name: members[name].content for name in ("json", "txt") if name in members}
    if len(images) != 1 or not texts:
        has = ", ".join(sorted(members))
        return row | {"error": f"{where} needs one image and a .json or .txt, has {has}"}
    if images[0].size > MAX_BYTES:
        return row | {"error": f"{where} has an image of {images[0].size} bytes"}
    row |= {"start": images[0].start, "size": images[0].size}
    return row | _parts(texts, config, name=row["uid"], where=where)


def scan_images(paths: Iterable[Path], folder: Path, config: SourceConfig) -> Iterator[Row]:
    """Give the images of a folder, each with what its `.txt` and `.json` of the same name say."""
    for path in paths:
        uid, where = as_text(os.fspath(path.relative_to(folder))), os.fspath(path)
        row: Row = {"uid": uid, "path": os.fsencode(path.absolute())}
        try:
            texts = _side_texts(path)
        except OSError as error:
            yield row | {"error": f"{error.filename} cannot be read: {error.strerror}"}
            continue
        if texts:
            yield row | _parts(texts, config, name=uid, where=where)
        else:
            yield row | {"error": f"{where} has no caption: found no .txt or .json of its name"}


def _side_texts(path: Path) -> dict[str, bytes]:
    files = [path.with_suffix(suffix) for suffix in SIDE_SUFFIXES]
    return {file.suffix[1:]: read_file(file, LONGEST) for file in files if file.exists()}


def first_record(path: Path, images: Iterable[Path], config: SourceConfig) -> Mapping[str, Any]:
    """Return the record of the first sample: of a tar, a table, or some images of a folder."""
    where = str(path)
    if images:
        texts = next((found for image in images if (found := _side_texts(image))), {})
        return record_of(texts, where)
    if path.name.lower().endswith(TAR_SUFFIXES):
        for _, (_, members) in samples_of(path):
            return record_of({name: member.content for name, member in members.items()}, where)
        return {}
    return next((record for _, record in _records_of(path, config)), {})


def _parts(texts: Mapping[str, bytes], config: SourceConfig, *, name: str, where: str) -> Row:
    """Read what stands next to an image, in a tar or a folder."""
    try:
        return parts_of(record_of(texts, where), config, name=name, where=where)
    except DataError as error:
        return {"error": str(error)}


def record_of(texts: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """Return the object in a `.json` as `json`, and the lines of a `.txt` as `txt`.

    Raises:
        DataError: one is not UTF-8 or no object; the message begins with `where`.
    """
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
    for number, (place, record) in enumerate(_records_of(path, config)):
        where, uid = f"{path}, {place}", f"{prefix}{number}"
        row: Row = {"uid": uid}
        try:
            row["split"] = whole_characters(str(record.get("split") or ""), where)
            row |= _table_image(record, config, folder, where)
            name = row.pop("name", uid)
            row |= parts_of(record, config, name=name, where=where)
        except DataError as error:
            row["error"] = str(error)
        yield row


def _records_of(path: Path, config: SourceConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    if is_json_lines(path):
        return objects_of(path)
    return rows_of(path, lambda columns: _columns(columns, config, path))


def _table_image(record: Mapping[str, Any], config: SourceConfig, folder: Path, where: str) -> Row:
    """Return the image of a row, or its path and the name that the table gives it."""
    value = image_in(record, config)
    if isinstance(value, bytes):
        return {"image": value}
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: found {value!r:.40}; expected an image or its path")
    name = whole_characters(value, where)
    return {"name": name, "path": os.fsencode((folder / name).absolute())}


def image_in(record: Mapping[str, Any], config: SourceConfig) -> Any:
    """Return the image of a row, or its path."""
    value = value_at(record, config.image or image_column(record))
    if isinstance(value, Mapping):  # as Hugging Face's datasets write images
        value = value.get("bytes") or value.get("path")
    return value


def _columns(columns: Sequence[str], config: SourceConfig, path: Path) -> Sequence[str]:
    """Choose the columns of a table that are read."""
    image = config.image or image_column(columns)
    named = [*chain.from_iterable(config.captions.values()), *config.language_of, config.concept]
    captions = [name for name in named if name] or caption_fields(tuple(columns))
    if not image or not (captions or "captions" in columns):
        raise not_understood(path)
    wanted = {image, *captions}
    missing = [name for name in wanted if not {name, name.partition(".")[0]} & set(columns)]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}; its columns are {quoted(columns)}")
    wanted |= {name.partition(".")[0] for name in wanted} | set(_OWN_COLUMNS)
    return [name for name in columns if name in wanted]


def not_understood(path: Path) -> DataError:
    """Say which columns a table has, and which it needs."""
    return DataError(
        f"{path} has the columns {quoted(columns_of(path))}; expected one of images, such as "
        f"{' or '.join(IMAGE_COLUMNS[:3])}, and one of captions, such as "
        f"{' or '.join(CAPTION_FIELDS)} or, by language, caption_zh"
    )


def image_column(columns: Iterable[str]) -> str:
    """Return the column of images by its name, or an empty string."""
    columns = set(columns)
    return next((name for name in IMAGE_COLUMNS if name in columns), "")


def is_json_lines(path: Path) -> bool:
    """Say whether a file has the name of JSON lines."""
    return path.name.lower().removesuffix(".gz").endswith(".jsonl")
