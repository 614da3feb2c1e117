"""Indexes of whole sources, made once: next to the shards of a folder, or in the cache folder."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from vlm.data.config import SourceConfig
from vlm.data.copies import local_copy
from vlm.data.index import VERSION, about_index, read_index, write_index
from vlm.data.layout import (
    Kind,
    Layout,
    ShardFile,
    layout_of,
    local_state,
    split_of,
    tars_in,
)
from vlm.data.manifest import Manifest, ShardEntry, write_manifest
from vlm.data.parallel import over
from vlm.data.scanning import Row, first_record, image_in, scan_images, scan_table, scan_tar
from vlm.errors import DataError
from vlm.files import sha256_of
from vlm.storage.cache_folder import cache_folder, locked
from vlm.storage.node_cache import NodeCache, RemoteFile
from vlm.storage.places import MissingFileError, RefusedError, shown, within

INDEX_FOLDER = "index"


def index_path(folder: Path, name: str) -> Path:
    """Return where the index of a data folder's shard lies."""
    return folder / INDEX_FOLDER / f"{name}.arrow"


def fetched_index(file: ShardFile, config: SourceConfig, cache: NodeCache) -> pyarrow.Table:
    """Return the index of a shard of a remote data folder.

    It is the one next to the shard, or else made of the shard and kept in the cache folder.

    Raises:
        ShardError: the shard is missing or damaged.
        PlaceError: it cannot be fetched, or not be kept.
    """
    own, described = _cached_path(file, config), about(file, config)
    if (table := read_index(own, described)) is not None:
        return table
    # A bucket that may not be listed refuses what it does not have.
    with suppress(MissingFileError, RefusedError), cache.copy_of(remote_index(file)) as path:
        if (table := read_index(path, described)) is not None:
            return table
    with locked(f"index/{own.stem}.lock"):  # one of a node's processes makes it
        if read_index(own, described) is None:
            _write_cached(file, kind="tars", config=config, cache=cache)
    table = read_index(own, described)
    assert table is not None, "it was written just now"
    return table


def remote_index(file: ShardFile) -> RemoteFile:
    """Return the index that may lie next to a shard of a remote data folder."""
    folder, _, name = file.name.rpartition("/")
    url = within(folder + file.path[len(file.name) :], f"{INDEX_FOLDER}/{name}.arrow")
    return RemoteFile(url, etag=file.state["sha256"])  # an index belongs to one shard's bytes


def cached_indexes(
    layout: Layout, config: SourceConfig, cache: NodeCache
) -> list[tuple[Path, int]]:
    """Return the index files of what has no manifest, and the rows in each.

    What is missing, damaged or of another state of a file is made, with a bar on a terminal.

    Raises:
        DataError: a file cannot be read, or none of its samples can be used.
        VlmError: the cache folder cannot be written to.
    """
    paths = [_cached_path(file, config) for file in layout.files]
    rows = {path: _rows_in(path) for path in paths}
    if None in rows.values():
        name = hashlib.sha256("".join(path.name for path in paths).encode()).hexdigest()
        with locked(f"index/{name}.lock"):  # one of a node's ranks makes them
            missing = [
                file
                for file, path in zip(layout.files, paths, strict=True)
                if rows[path] is None and _rows_in(path) is None
            ]
            made = over(
                partial(_write_cached, kind=layout.kind, config=config, cache=cache),
                missing,
                size=sum(file.size for file in missing),
                title=f"indexing {shown(config.path)}",
            )
            deque(made, maxlen=0)
        rows |= {path: _rows_in(path) for path, number in rows.items() if number is None}
    return [(path, number) for path, number in rows.items() if number is not None]


def _rows_in(path: Path) -> int | None:
    table = read_index(path, {})
    return None if table is None else len(table)


def about(file: ShardFile, config: SourceConfig) -> dict[str, Any]:
    """Return what the index of a file depends on, as plain values."""
    captions = {language: list(fields) for language, fields in config.captions.items()}
    fields = [captions, list(config.language_of), config.image, config.concept]
    folder = str(config.images.absolute()) if config.images else ""
    return {"prefix": file.prefix, "fields": fields, "images": folder, **file.state}


def _cached_path(file: ShardFile, config: SourceConfig) -> Path:
    path = file.path if file.is_remote else str(Path(file.path).absolute())
    record = json.dumps([VERSION, path, about(file, config)])
    return cache_folder() / "index" / f"{hashlib.sha256(record.encode()).hexdigest()}.arrow"


def _write_cached(file: ShardFile, *, kind: Kind, config: SourceConfig, cache: NodeCache) -> None:
    own, described = _cached_path(file, config), about(file, config)
    if kind == "images":
        write_index(
            own, _checked(scan_images(file.images, Path(file.path), config), file), described
        )
        return
    with local_copy(file, cache) as path:
        rows: Iterable[Row]
        if kind == "tars":
            rows = scan_tar(path, config, prefix=file.prefix).rows
        else:
            if file.is_remote:
                _check_images(path, file, config)
            rows = scan_table(path, config, prefix=file.prefix)
        if file.is_remote:
            rows = _named(rows, path, file.name)
            described |= {"sha256": sha256_of(path)}  # so that it is the same file ever after
        write_index(own, _checked(rows, file), described)


def _named(rows: Iterable[Row], path: Path, name: str) -> Iterator[Row]:
    """Let what is wrong with a sample name the file, not its copy."""
    for row in rows:
        yield row | {"error": row["error"].replace(str(path), name)} if "error" in row else row


def _check_images(path: Path, file: ShardFile, config: SourceConfig) -> None:
    """Refuse a remote table of paths that start from its own folder."""
    image = image_in(first_record(path, (), config), config)
    if isinstance(image, str) and not config.images and not Path(image).is_absolute():
        raise DataError(
            f"{file.name} has the paths of images, such as {image!r:.60}, which are not fetched "
            "one by one; expected the images themselves, tars such as img2dataset makes, or "
            "`images`, a folder of this machine"
        )


def _checked(rows: Iterable[Row], file: ShardFile) -> Iterator[Row]:
    """Refuse a file with no sample that can be used, or fewer than img2dataset has counted."""
    number, first, usable = 0, "", False
    for row in rows:
        number += 1
        first = first or row.get("error", "")
        usable = usable or "error" not in row
        yield row
    if first and not usable:
        raise DataError(f"none of the {number} samples of {file.name} can be used: {first}")
    expected = None if file.is_remote else _counted_by_img2dataset(Path(file.path))
    if expected not in (None, number):
        raise DataError(
            f"{file.name} holds {number} samples, img2dataset counted {expected}; it is cut off, "
            "or still being written"
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


def index_folder(folder: Path, config: SourceConfig | None = None) -> Manifest:
    """Write the manifest of the tars in a folder, and an index of each; return the manifest.

    The split of a tar is the part of its name before its number: `train-00000.tar`; of `00000.tar`
    it is `train`. A tar whose index is there already is not read again unless it has changed.

    Raises:
        DataError: there is no such folder, no tar in it, one cannot be read, or a key occurs twice
            in a split.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one with WebDataset shards")
    config = config or SourceConfig(path=str(folder))
    paths = tars_in(folder).get("", [])
    if not paths:
        raise DataError(f"{folder} holds no shard; expected files like train-00000.tar")
    for path in paths:
        if path.with_name(f"{path.name}.gz").exists():
            raise DataError(f"found both {path} and {path.name}.gz; expected one of the two")
    states = [local_state(str(path)) for path in paths]
    files = [
        ShardFile(path=str(path), size=state["bytes"], state=state)
        for path, state in zip(paths, states, strict=True)
    ]
    return _index_tars(files, config, out=folder, title=str(folder))


def index_place(config: SourceConfig, out: Path, cache: NodeCache) -> Manifest:
    """Do the same for tars at a place; what is written is for their folder there.

    Args:
        config: Names tars of one folder by a URL.
        out: The folder to write to.
        cache: Where the tars are fetched to.

    Raises:
        DataError: the tars are of several folders, or as in `index_folder`.
        PlaceError: one cannot be fetched, or not be kept.
    """
    layout = layout_of(config)
    folders = {file.name.rpartition("/")[0] for file in layout.files if file.is_remote}
    if layout.kind != "tars" or len(folders) != 1:
        raise DataError(
            f"{shown(config.path)} is not a folder of tars at a place; expected an address such as "
            "s3://bucket/folder/*.tar"
        )
    files = [replace(file, prefix="") for file in layout.files]
    return _index_tars(files, config, out=out, title=folders.pop(), cache=cache)


def _index_tars(
    files: Sequence[ShardFile],
    config: SourceConfig,
    *,
    out: Path,
    title: str,
    cache: NodeCache | None = None,
) -> Manifest:
    splits: dict[str, list[ShardEntry]] = {}
    of_files = [split_of(Path(file.name)) for file in files]
    size = sum(file.size for file in files)
    indexed = partial(_indexed, config=config, out=out, cache=cache)
    entries = over(indexed, files, size=size, title=f"indexing {title}")
    for split, entry in zip(of_files, entries, strict=True):
        splits.setdefault(split, []).append(entry)
    for of_split in splits.values():
        check_uids([
            (f"{title}/{e.name}", partial(_uids_in, index_path(out, e.name))) for e in of_split
        ])  # fmt: skip
    manifest = Manifest(splits={split: tuple(found) for split, found in splits.items()})
    write_manifest(out, manifest)
    return manifest


def _indexed(
    file: ShardFile, *, config: SourceConfig, out: Path, cache: NodeCache | None
) -> ShardEntry:
    """Return the entry of a tar, after its index is written, unless that is there and fits."""
    name = Path(file.name).name
    index, described = index_path(out, name), about(file, config)
    table = read_index(index, described)
    if table is None:
        with local_copy(file, cache) as path:
            digest = sha256_of(path)
            rows = list(_named(scan_tar(path, config).rows, path, file.name))
            write_index(index, _checked(rows, file), described | {"sha256": digest})
            entry = ShardEntry(name=name, samples=len(rows), bytes=file.size, sha256=digest)
            entry.verify(path, found=digest)  # so that a run on this machine need not read it again
        return entry
    digest = about_index(table)["sha256"]
    return ShardEntry(name=name, samples=table.num_rows, bytes=file.size, sha256=digest)


def check_uids(shards: Sequence[tuple[str, Callable[[], list[str]]]]) -> None:
    """Refuse uids that occur twice: their samples would count as one.

    Args:
        shards: The name of each, and what gives its uids. They are asked for twice at most, and
            only their hashes are in memory for all shards, 8 bytes each.

    Raises:
        DataError: a uid occurs twice.
    """
    hashes = [np.fromiter(map(hash, uids_of()), np.int64) for _, uids_of in shards]
    ordered = np.sort(np.concatenate(hashes))
    twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen: dict[str, str] = {}
    for name, uids_of in shards if twice else ():
        for uid in uids_of():
            if uid in seen:
                raise DataError(
                    f"the key {uid!r} is in {seen[uid]} and in {name}; expected every key of a "
                    "split once, for example with the shard's name in front: 00001/00000"
                )
            if hash(uid) in twice:
                seen[uid] = name


def _uids_in(index: Path) -> list[str]:
    table = read_index(index, {})
    assert table is not None, "it was read or written just now"
    uids: list[str] = table["uid"].to_pylist()
    return uids
