"""Where the index of a file is: next to its shard or in the cache folder, made if it is neither."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from vlm.data.config import SourceConfig
from vlm.data.copies import local_copy
from vlm.data.index import VERSION, about_index, read_index, table_of, write_index
from vlm.data.layout import Layout, ShardFile, files_of, layout_of, split_of, tars_in
from vlm.data.manifest import Manifest, ShardEntry, write_manifest
from vlm.data.parallel import over
from vlm.data.sample import counted
from vlm.data.scanning import Row, first_record, image_in, scan_images, scan_table, scan_tar
from vlm.errors import DataError, ShardError, VlmError
from vlm.files import sha256_of
from vlm.records.texts import listed
from vlm.storage.cache_folder import cache_folder, locked, once
from vlm.storage.node_cache import NodeCache, RemoteFile
from vlm.storage.places import MissingFileError, RefusedError, shown, within

INDEX_FOLDER = "index"
_NAMED = 10  # damaged files in an error


def index_of(file: ShardFile, config: SourceConfig, cache: NodeCache) -> pyarrow.Table:
    """Return the index of a file; one that is neither next to it nor in the cache folder is made.

    Raises:
        ShardError: the file is missing, damaged, or has other samples than its manifest says.
        DataError: it has no manifest, and cannot be read or none of its samples be used.
        PlaceError: it cannot be fetched, or not be kept.
        VlmError: it has no manifest, and the cache folder cannot be written to.
    """
    own, described = _cached_path(file, config), _about(file, config)
    table = read_index(own, described)
    if table is None and file.entry:
        table = _next_to(file, described, cache)
    if table is None:
        with locked(f"index/{own.stem}.lock"):  # one of a node's processes makes it
            table = read_index(own, described)
            if table is None:
                table = _made(own, file, config, cache, hashed=file.is_remote and not file.entry)
    if file.entry and len(table) != file.entry.samples:
        raise ShardError(
            f"shard {file.name} holds {counted(len(table), 'sample')}, the manifest says "
            f"{file.entry.samples}"
        )
    return table


def remote_index(file: ShardFile) -> RemoteFile:
    """Return the index that may lie next to a shard of a remote data folder."""
    folder, name = os.path.split(file.name)
    url = within(folder + file.path[len(file.name) :], f"{INDEX_FOLDER}/{name}.arrow")
    return RemoteFile(url, etag=file.state["sha256"])  # an index belongs to one shard's bytes


def row_counts(layout: Layout, config: SourceConfig, cache: NodeCache) -> list[int]:
    """Return the rows of each file, as its manifest or its index has them; errors of `index_of`.

    Indexes that are missing are made, in several processes and with a bar on a terminal.
    """
    counts = [_known_rows(file, config) for file in layout.files]
    missing = [file for file, rows in zip(layout.files, counts, strict=True) if rows is None]
    made = over(
        partial(_made_rows, config=config, cache=cache),
        missing,
        size=sum(file.size for file in missing),
        title=f"indexing {shown(config.path)}",
    )
    rows_made, faults = list[int](), list[str]()
    for each in made:
        rows_made.append(each) if isinstance(each, int) else faults.append(each)
    if faults:
        raise DataError(listed(faults, _NAMED, "; "))
    of_missing = iter(rows_made)
    return [next(of_missing) if rows is None else rows for rows in counts]


def _known_rows(file: ShardFile, config: SourceConfig) -> int | None:
    if file.entry:
        return file.entry.samples
    table = read_index(_cached_path(file, config), {})
    return None if table is None else len(table)


def _made_rows(file: ShardFile, *, config: SourceConfig, cache: NodeCache) -> int | str:
    """Return the rows, or what is wrong with the file: all that are damaged are named at once."""
    try:
        return len(index_of(file, config, cache))
    except DataError as error:
        return str(error)


def _about(file: ShardFile, config: SourceConfig) -> dict[str, Any]:
    """Return what the index of a file depends on, as plain values."""
    captions = {language: list(fields) for language, fields in config.captions.items()}
    fields = [captions, list(config.language_of), config.image, config.concept]
    folder = str(config.images.absolute()) if config.images else ""
    return {"prefix": file.prefix, "fields": fields, "images": folder, **file.state}


def _cached_path(file: ShardFile, config: SourceConfig) -> Path:
    path = file.path if file.is_remote else str(Path(file.path).absolute())
    record = json.dumps([VERSION, path, _about(file, config)])
    return cache_folder() / "index" / f"{hashlib.sha256(record.encode()).hexdigest()}.arrow"


def _index_in(folder: Path, file: ShardFile) -> Path:
    """Return where a data folder has the index of a shard."""
    return folder / INDEX_FOLDER / f"{os.path.basename(file.name)}.arrow"


def _next_to(file: ShardFile, described: dict[str, Any], cache: NodeCache) -> pyarrow.Table | None:
    if not file.is_remote:
        return read_index(_index_in(Path(file.path).parent, file), described)
    # A bucket that may not be listed refuses what it does not have.
    with suppress(MissingFileError, RefusedError), cache.copy_of(remote_index(file)) as path:
        return read_index(path, described)
    return None


def _made(
    to: Path, file: ShardFile, config: SourceConfig, cache: NodeCache | None, *, hashed: bool
) -> pyarrow.Table:
    """Look through a file and write its index, with the hash of its bytes if that is asked for."""
    described = _about(file, config)
    with local_copy(file, cache) as path:
        if hashed:
            described["sha256"] = sha256_of(path)
            once(path, described["sha256"], lambda: None)  # no run on this machine need do it again
        rows: Iterable[Row] = _checked(_rows_of(file, path, config), file, path)
        rows = list(rows) if file.entry else rows
        try:
            return write_index(to, rows, described)
        except VlmError:
            if not file.entry:
                raise
            return table_of(rows)  # a data folder can be read without a cache folder


def _rows_of(file: ShardFile, path: Path, config: SourceConfig) -> Iterable[Row]:
    if file.images:
        return scan_images(file.images, path, config)
    if file.is_tar:
        return scan_tar(path, config, prefix=file.prefix)
    if file.is_remote:
        _check_images(path, file, config)
    return scan_table(path, config, prefix=file.prefix)


def _check_images(path: Path, file: ShardFile, config: SourceConfig) -> None:
    """Refuse a remote table of paths that start from its own folder."""
    image = image_in(first_record(path, (), config), config)
    if isinstance(image, str) and not config.images and not Path(image).is_absolute():
        raise DataError(
            f"{file.name} has the paths of images, such as {image!r:.60}, which are not fetched "
            "one by one; expected the images themselves, tars such as img2dataset makes, or "
            "`images`, a folder of this machine"
        )


def _checked(rows: Iterable[Row], file: ShardFile, path: Path) -> Iterator[Row]:
    """Pass rows on; refuse an unlisted file with no usable sample, or fewer than counted."""
    number, first, usable = 0, "", False
    for row in rows:
        number += 1
        if "error" in row:  # it names the file, not its copy
            row["error"] = row["error"].replace(str(path), file.name)
            first = first or row["error"]
        else:
            usable = True
        yield row
    if file.entry:
        return
    if first and not usable:
        raise DataError(f"no sample of {file.name} can be used: {first}")
    expected = None if file.is_remote else _counted_by_img2dataset(path)
    if expected not in (None, number):
        raise DataError(
            f"{file.name} holds {counted(number, 'sample')}, img2dataset counted {expected}; it is "
            "cut off, or still being written"
        )


def _counted_by_img2dataset(path: Path) -> int | None:
    stats = path.with_name(f"{path.name.partition('.')[0]}_stats.json")
    if not path.name.endswith(".tar") or not stats.is_file():
        return None
    try:
        return int(json.loads(stats.read_bytes())["successes"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{stats} is no file of img2dataset: {error}") from error


# Data folders.


def index_folder(
    folder: Path, config: SourceConfig | None = None, cache: NodeCache | None = None
) -> Manifest:
    """Write the manifest of tars, and an index of each, to a folder; return the manifest.

    The split of a tar is the part of its name before its number: `train-00000.tar`; of `00000.tar`
    it is `train`. A tar whose index is there already is not read again unless it has changed.

    Args:
        folder: The one with the tars; or what is then put next to those at a place.
        config: The fields of the tars; with a cache also their place.
        cache: Where tars at a place are fetched to.

    Raises:
        DataError: there is no such folder, no tar in it, one cannot be read, or a key occurs twice
            in a split.
        PlaceError: one cannot be fetched, or not be kept.
    """
    config = config or SourceConfig(path=str(folder))
    files = _tars_at_place(config) if cache else _tars_in_folder(folder)
    splits: dict[str, list[ShardFile]] = {}
    for file in files:
        splits.setdefault(split_of(Path(file.name)), []).append(replace(file, prefix=""))
    files = [file for of_split in splits.values() for file in of_split]
    entries = iter(
        over(
            partial(_indexed, config=config, folder=folder, cache=cache),
            files,
            size=sum(file.size for file in files),
            title=f"indexing {shown(config.path)}",
        )
    )
    manifest = Manifest(
        splits={name: tuple(islice(entries, len(of))) for name, of in splits.items()}
    )
    for of_split in splits.values():
        check_uids(
            [(file.name, partial(read_index, _index_in(folder, file), {})) for file in of_split]
        )
    write_manifest(folder, manifest)
    return manifest


def _tars_in_folder(folder: Path) -> list[ShardFile]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one with WebDataset shards")
    paths = tars_in(folder).get("", [])
    if not paths:
        raise DataError(f"{folder} holds no shard; expected files like train-00000.tar")
    for path in paths:
        if path.with_name(f"{path.name}.gz").exists():
            raise DataError(f"found both {path} and {path.name}.gz; expected one of the two")
    return files_of(map(str, paths))


def _tars_at_place(config: SourceConfig) -> Sequence[ShardFile]:
    layout = layout_of(config)
    folders = {os.path.dirname(file.name) for file in layout.files if file.is_remote}
    if layout.kind != "tars" or len(folders) != 1:
        raise DataError(
            f"{shown(config.path)} is not a folder of tars at a place; expected an address such as "
            "s3://bucket/folder/*.tar"
        )
    return layout.files


def _indexed(
    file: ShardFile, *, config: SourceConfig, folder: Path, cache: NodeCache | None
) -> ShardEntry:
    """Return the entry of a tar, after its index is written, unless that is there and fits."""
    index = _index_in(folder, file)
    table = read_index(index, _about(file, config))
    if table is None:
        table = _made(index, file, config, cache, hashed=True)
    name, sha256 = os.path.basename(file.name), about_index(table)["sha256"]
    return ShardEntry(name=name, samples=len(table), bytes=file.size, sha256=sha256)


def check_uids(indexes: Sequence[tuple[str, Callable[[], pyarrow.Table]]]) -> None:
    """Refuse uids that occur twice: their samples would count as one.

    Args:
        indexes: The name of each shard, and what gives its index. It is asked for twice at most,
            and only hashes of uids are in memory for all shards, 8 bytes each.

    Raises:
        DataError: a uid occurs twice.
    """
    hashes = [np.fromiter(map(hash, index()["uid"].to_pylist()), np.int64) for _, index in indexes]
    ordered = np.sort(np.concatenate(hashes))
    twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen: dict[str, str] = {}
    for name, index in indexes if twice else ():
        for uid in index()["uid"].to_pylist():
            if uid in seen:
                raise DataError(
                    f"the key {uid!r} is in {seen[uid]} and in {name}; expected every key of a "
                    "split once, for example with the shard's name in front: 00001/00000"
                )
            if hash(uid) in twice:
                seen[uid] = name
