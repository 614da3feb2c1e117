"""Samples of any source by their index, read from shards that are opened when they are needed."""

import mmap
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow
from numpy.typing import NDArray

from vlm.data.conditions import Conditions
from vlm.data.config import CACHE_GIB, DEFAULT_SPLIT, SourceConfig, Verify
from vlm.data.copies import local_copy, node_cache, remote_file
from vlm.data.index import about_index, read_index, table_of
from vlm.data.indexing import (
    about,
    check_uids,
    fetched_index,
    remote_index,
)
from vlm.data.layout import layout_of
from vlm.data.listing import Shard, shards_of
from vlm.data.records import as_text, listed
from vlm.data.sample import Sample
from vlm.data.scanning import bytes_in, scan_tar, tar_content
from vlm.errors import DataError, ShardError
from vlm.files import read_file
from vlm.images.decoding import MAX_BYTES, decode_image
from vlm.storage.node_cache import NodeCache, RemoteFile
from vlm.storage.places import shown
from vlm.text.caption_ids import text_id

_T = TypeVar("_T")


class Source:
    """The samples of a source in their order; `open_source` makes one.

    Shards are opened when a sample of theirs is read. It can be sent to another process.
    """

    def __init__(
        self,
        config: SourceConfig,
        shards: Sequence[Shard],
        verify: Verify,
        keep_open: int,
        cache: NodeCache,
    ) -> None:
        self.config = config
        self._shards = shards
        self._verify, self._cache = verify, cache
        self._settings = (verify, keep_open, cache)
        self._ends = list(accumulate(map(len, shards)))
        self._indexes = lru_cache(keep_open)(partial(_tried, self._read_index))
        self._tars = lru_cache(keep_open)(partial(_tried, self._open_tar))

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"the split {self.config.split!r} of {shown(self.config.path)}"

    @property
    def sizes(self) -> list[int]:
        """The number of samples in each shard."""
        return list(map(len, self._shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def keeping_open(self, number: int) -> "Source":
        """Return the same source with at most `number` shards open in a process."""
        verify, keep_open, cache = self._settings
        return Source(self.config, self._shards, verify, min(number, keep_open), cache)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Begin to fetch shards of a remote source that are read next.

        Nothing is done where the cache has no room for all of them.
        """
        if not (self._shards and self._shards[0].file.is_remote):
            return
        files = {n: self._shards[n].file for n in shards}
        tars = {n: file for n, file in files.items() if file.is_tar}
        if sum(file.size for file in tars.values()) <= self._cache.max_bytes:
            self._cache.prefetch(each for n in tars for each in self._files_of(n))

    def _files_of(self, number: int) -> list[RemoteFile]:
        """Return what is fetched to read from a tar at a place."""
        shard = self._shards[number]
        if shard.index is None:
            return [remote_index(shard.file), remote_file(shard.file)]
        return [remote_file(shard.file, sha256=self._noted_hash(number))]

    def _noted_hash(self, number: int) -> str | None:
        """Return the SHA-256 that a tar in no manifest had when its index was made."""
        sha256: str | None = about_index(self._table(number)).get("sha256")
        return sha256

    def at(self, shard: int, row: int) -> Sample:
        """Return the sample in a row of a shard.

        Raises:
            ShardError: the shard is missing or damaged.
            DataError: the sample cannot be used.
            PlaceError: the shard cannot be fetched, or not be kept here.
        """
        row = self._row(shard, row)
        found = self._record(shard, row)
        if found["error"] is not None:
            raise DataError(found["error"])
        return Sample(
            uid=found["uid"],
            image=self._image(shard, found),
            captions=dict(found["captions"]),
            concept=found["concept"],
            source=found["source"],
            licence=found["licence"],
            labels=dict(found["labels"]),
            address=self._address(shard, row, found),
        )

    def __getitem__(self, index: int) -> Sample:
        """Return the sample at `index` in [0, len); errors as in `at`."""
        return self.at(*self._place(index))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def _place(self, index: int) -> tuple[int, int]:
        """Return the number of a sample's shard, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._ends, index)
        return shard, index - self._ends[shard] + len(self._shards[shard])

    def address(self, shard: int, row: int) -> str:
        """Return where a sample lies: the file of its image, or `SHARD#ROW`, rows from 0."""
        row, found = self._row(shard, row), {}
        with suppress(ShardError):
            found = self._record(shard, row)
        return self._address(shard, row, found)

    def _address(self, shard: int, row: int, found: Mapping[str, Any]) -> str:
        if found.get("path") is not None:
            return as_text(os.fsdecode(found["path"]))
        place = self._shards[shard]
        return f"{place.file.name}#{place.start + row}"

    def _record(self, shard: int, row: int) -> dict[str, Any]:
        found: dict[str, Any] = self._table(shard).slice(row, 1).to_pylist()[0]
        return found

    def _image(self, shard: int, found: Mapping[str, Any]) -> bytes:
        if found["image"] is not None:
            image: bytes = found["image"]
            return image
        if found["path"] is None:
            content = _or_raise(self._tars(shard)).content
            return bytes_in(content, found["start"], found["size"])
        path = Path(os.fsdecode(found["path"]))
        try:
            return read_file(path, MAX_BYTES)
        except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{as_text(str(path))} cannot be read: {reason}") from error

    def rows(self, shard: int, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Return some columns of the index of a shard, a row a sample."""
        kept = self._shards[shard].kept
        table = self._table(shard).select(list(columns))
        rows: list[dict[str, Any]] = (table if kept is None else table.take(kept)).to_pylist()
        return rows

    def label_ids(self, key: str, shard: int) -> NDArray[np.int64]:
        """Return a number for a label of each sample of a shard, equal where that is equal."""
        labels = [dict(row["labels"] or ()).get(key, "") for row in self.rows(shard, ["labels"])]
        ids = {label: text_id(label) for label in set(labels)}
        return np.array([ids[label] for label in labels], np.int64)

    def damaged(self) -> Iterator[str]:
        """Give a sentence for every sample that cannot be read, and one for a damaged shard."""
        for shard in range(len(self._shards)):
            yield from self.damaged_in(shard)

    def damaged_in(self, shard: int) -> list[str]:
        """Return the same for one shard."""
        found = []
        for row in range(len(self._shards[shard])):
            try:
                sample = self.at(shard, row)
                decode_image(sample.image, name=f"{sample.uid} ({sample.address})")
            except ShardError as error:
                return [str(error)]
            except DataError as error:
                found.append(str(error))
        return found

    def check_uids(self) -> None:
        """Refuse, by a `DataError`, uids that occur twice; the index of every shard is read."""
        check_uids(
            [(shard.file.name, partial(self._uids, n)) for n, shard in enumerate(self._shards)]
        )

    def _uids(self, shard: int) -> list[str]:
        return [row["uid"] for row in self.rows(shard, ["uid"])]

    def __reduce__(self) -> tuple[type["Source"], tuple[Any, ...]]:
        """Open the shards anew in another process: a memory map cannot be sent to one."""
        return type(self), (self.config, self._shards, *self._settings)

    def where(self, where: Sequence[str]) -> "Source":
        """Return the samples that meet all conditions; the index of every shard is read.

        Raises:
            DataError: one is not a condition, or asks for a key that no sample has.
        """
        conditions = Conditions(where)
        chosen = self._with([conditions.rows_of(self._table(n)) for n in range(len(self._shards))])
        conditions.check_keys(self.name)
        return chosen

    def of_split(self) -> "Source":
        """Return the samples of the split, if the source is a table with a column of splits.

        Raises:
            DataError: there is no such split.
        """
        splits = [
            self._table(n)["split"].to_numpy(zero_copy_only=False) for n in range(len(self._shards))
        ]
        known = {split for of_shard in splits for split in of_shard if split}
        if not known and self.config.split == DEFAULT_SPLIT:
            return self
        if self.config.split not in known:
            has = f"its splits are {listed(sorted(known))}" if known else "it has no splits"
            raise DataError(f"{self.config.path} has no split {self.config.split!r}; {has}")
        return self._with([np.flatnonzero(of_shard == self.config.split) for of_shard in splits])

    def _with(self, rows: Sequence[NDArray[np.int64]]) -> "Source":
        """Return the samples in some rows of the shards; what has none left is no shard."""
        shards = [
            replace(shard, kept=kept if shard.kept is None else np.intersect1d(kept, shard.kept))
            for shard, kept in zip(self._shards, rows, strict=True)
        ]
        return Source(self.config, [shard for shard in shards if len(shard)], *self._settings)

    def _row(self, shard: int, row: int) -> int:
        """Return where a row lies in the shard's part of the index."""
        if not 0 <= row < len(self._shards[shard]):
            raise IndexError(row)
        kept = self._shards[shard].kept
        return row if kept is None else int(kept[row])

    def _table(self, number: int) -> pyarrow.Table:
        return _or_raise(self._indexes(number))

    def _read_index(self, number: int) -> pyarrow.Table:
        """Return a shard's part of its index; a tar is not opened for it if it has one."""
        shard = self._shards[number]
        if shard.index is None:
            table = fetched_index(shard.file, self.config, self._cache)
        else:
            table = self._index_file(shard)
            if table is None and shard.file.entry:
                table = _or_raise(self._tars(number)).table
        if table is not None and shard.file.entry and len(table) != shard.rows:
            raise ShardError(
                f"shard {shard.file.name} holds {len(table)} samples, the manifest says "
                f"{shard.rows}"
            )
        if table is None or len(table) < shard.start + shard.rows:
            raise ShardError(
                f"{shard.index}, the index of {shard.file.name}, is gone; open it anew"
            )
        return table.slice(shard.start, shard.rows)

    def _index_file(self, shard: Shard) -> pyarrow.Table | None:
        return shard.index and read_index(shard.index, about(shard.file, self.config))

    def _open_tar(self, number: int) -> "_OpenTar":
        shard = self._shards[number]
        file, table = shard.file, None
        if file.entry and shard.index:
            table = self._index_file(shard)
        sha256 = None if file.entry else self._noted_hash(number)
        with local_copy(file, self._cache, sha256=sha256) as path:
            # What comes from a place was compared when it came.
            if file.entry and not (file.is_remote and self._verify == "once"):
                file.entry.verify(path, self._verify)
            if file.entry and shard.index and table is None:
                content, rows = scan_tar(path, self.config, prefix=file.prefix)
                return _OpenTar(content, table_of(rows))
            return _OpenTar(tar_content(path), None)


class _OpenTar(NamedTuple):
    content: bytes | mmap.mmap
    table: pyarrow.Table | None
    """Of one without an index, which was scanned."""


def _tried(call: Callable[[int], _T], number: int) -> _T | ShardError:
    """Return an error as others return a value, so that a damaged shard is looked through once."""
    try:
        return call(number)
    except ShardError as error:
        return error


def _or_raise(found: _T | ShardError) -> _T:
    if isinstance(found, ShardError):
        raise ShardError(str(found))
    return found


def open_source(
    config: SourceConfig,
    *,
    verify: Verify = "once",
    keep_open: int = 200,
    cache_gib: float = CACHE_GIB,
) -> Source:
    """Open what a source names: manifests and counts are read, and no samples.

    What has no manifest is looked through when it is first opened, in several processes and with a
    bar on a terminal; what was found is kept in the cache folder as long as nothing changes.

    Args:
        config: The source.
        verify: When the hashes of a data folder's shards are compared with its manifest.
        keep_open: Shards that each process keeps open; packed ones are in memory then. Of those at
            a place no more than half the cache holds.
        cache_gib: Disk space for copies of what is read from a place, in GiB.

    Raises:
        DataError: nothing is there, it is of no known kind or damaged, or no sample is left.
        PlaceError: a place cannot be reached, or what it holds not be kept here.
        VlmError: the cache folder cannot be written to.
    """
    layout, cache = layout_of(config), node_cache(cache_gib)
    if largest := max((file.size for file in layout.files if file.is_remote), default=0):
        # What is open takes its space on the disk also after it has made room for others.
        keep_open = max(min(keep_open, cache.max_bytes // (2 * largest)), 1)
    source = Source(config, shards_of(layout, config, cache), verify, keep_open, cache)
    if layout.kind == "tables":
        source = source.of_split()
    if config.where:
        source = source.where(config.where)
    if not len(source):
        reason = f"has no sample where {' and '.join(config.where)}" if config.where else "is empty"
        raise DataError(f"{source.name} {reason}")
    return source
