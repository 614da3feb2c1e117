"""Indexes of whole sources, made once: next to the shards of a folder, or in the cache folder."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.cache import cache_folder, locked
from vlm.data.config import SourceConfig
from vlm.data.index import VERSION, about_index, read_index, write_index
from vlm.data.layout import Kind, Layout, ShardFile, split_of, tars_in
from vlm.data.manifest import Manifest, ShardEntry, write_manifest
from vlm.data.parallel import over
from vlm.data.scanning import Row, scan_images, scan_table, scan_tar
from vlm.errors import DataError
from vlm.files import sha256_of

INDEX_FOLDER = "index"


def index_path(folder: Path, name: str) -> Path:
    """Return where the index of a data folder's shard lies."""
    return folder / INDEX_FOLDER / f"{name}.arrow"


def cached_indexes(layout: Layout, config: SourceConfig) -> list[tuple[Path, int]]:
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
                partial(_write_cached, kind=layout.kind, config=config),
                missing,
                size=sum(file.size for file in missing),
                title=f"indexing {config.path}",
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
    record = json.dumps([VERSION, str(file.path.absolute()), about(file, config)])
    return cache_folder() / "index" / f"{hashlib.sha256(record.encode()).hexdigest()}.arrow"


def _write_cached(file: ShardFile, *, kind: Kind, config: SourceConfig) -> None:
    rows: Iterable[Row]
    if kind == "tars":
        rows = scan_tar(file.path, config, prefix=file.prefix).rows
    elif kind == "tables":
        rows = scan_table(file.path, config, prefix=file.prefix)
    else:
        rows = scan_images(file.images, file.path, config)
    write_index(_cached_path(file, config), _checked(rows, file.path), about(file, config))


def _checked(rows: Iterable[Row], path: Path) -> Iterator[Row]:
    """Refuse a file with no sample that can be used, or fewer than img2dataset has counted."""
    number, first, usable = 0, "", False
    for row in rows:
        number += 1
        first = first or row.get("error", "")
        usable = usable or "error" not in row
        yield row
    if first and not usable:
        raise DataError(f"none of the {number} samples of {path} can be used: {first}")
    expected = _counted_by_img2dataset(path)
    if expected not in (None, number):
        raise DataError(
            f"{path} holds {number} samples, img2dataset counted {expected}; it is cut off, or "
            "still being written"
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
    splits: dict[str, list[ShardEntry]] = {}
    of_paths = [split_of(path) for path in paths]
    for path in paths:
        if path.with_name(f"{path.name}.gz").exists():
            raise DataError(f"found both {path} and {path.name}.gz; expected one of the two")
    size = sum(path.stat().st_size for path in paths)
    entries = over(partial(_indexed, config=config), paths, size=size, title=f"indexing {folder}")
    for split, entry in zip(of_paths, entries, strict=True):
        splits.setdefault(split, []).append(entry)
    for of_split in splits.values():
        check_uids(
            [(folder / e.name, partial(_uids_in, index_path(folder, e.name))) for e in of_split]
        )
    manifest = Manifest(splits={split: tuple(found) for split, found in splits.items()})
    write_manifest(folder, manifest)
    return manifest


def _indexed(path: Path, *, config: SourceConfig) -> ShardEntry:
    """Return the entry of a tar, after its index is written, unless that is there and fits."""
    found = path.stat()
    state = {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns}
    file = ShardFile(path=path, size=found.st_size, state=state)
    index = index_path(path.parent, path.name)
    table = read_index(index, about(file, config))
    if table is None:
        digest, rows = sha256_of(path), scan_tar(path, config).rows
        write_index(index, _checked(rows, path), about(file, config) | {"sha256": digest})
        number = len(rows)
    else:
        digest, number = about_index(table)["sha256"], table.num_rows
    entry = ShardEntry(name=path.name, samples=number, bytes=found.st_size, sha256=digest)
    if table is None:
        entry.verify(path, found=digest)  # so that a run on this machine need not read it again
    return entry


def check_uids(shards: Sequence[tuple[Path, Callable[[], list[str]]]]) -> None:
    """Refuse uids that occur twice: their samples would count as one.

    Args:
        shards: The path of each, and what gives its uids. They are asked for twice at most, and
            only their hashes are in memory for all shards, 8 bytes each.

    Raises:
        DataError: a uid occurs twice.
    """
    hashes = [np.fromiter(map(hash, uids_of()), np.int64) for _, uids_of in shards]
    ordered = np.sort(np.concatenate(hashes))
    twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen: dict[str, Path] = {}
    for path, uids_of in shards if twice else ():
        for uid in uids_of():
            if uid in seen:
                raise DataError(
                    f"the key {uid!r} is in {seen[uid]} and in {path}; expected every key of a "
                    "split once, for example with the shard's name in front: 00001/00000"
                )
            if hash(uid) in twice:
                seen[uid] = path


def _uids_in(index: Path) -> list[str]:
    table = read_index(index, {})
    assert table is not None, "it was read or written just now"
    uids: list[str] = table["uid"].to_pylist()
    return uids
