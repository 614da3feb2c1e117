"""Samples of any source by their index, read from shards that are opened when they are needed."""

import hashlib
import mmap
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow
from numpy.typing import NDArray

from vlm.data.conditions import Conditions
from vlm.data.config import CACHE_GIB, DEFAULT_SPLIT, SourceConfig, Verify
from vlm.data.copies import check_unchanged, local_copy, node_cache, remote_file
from vlm.data.index import ROWS, SCHEMA, about_index
from vlm.data.indexing import check_uids, index_of, remote_index, row_counts
from vlm.data.layout import Layout, ShardFile, layout_of
from vlm.data.parallel import TYPICAL_BYTES, over
from vlm.data.sample import Sample
from vlm.errors import DataError, ShardError
from vlm.files import read_file
from vlm.images.decoding import MAX_BYTES, decode_image
from vlm.records.tars import bytes_in, tar_content
from vlm.records.texts import as_text, listed
from vlm.storage.node_cache import NodeCache, RemoteFile
from vlm.storage.places import shown
from vlm.text.caption_ids import text_id

_COMPARED = 10_000  # shards whose sizes are compared at the start; of more, each when it is opened
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Samples that are opened together: a tar, or some rows of a table or of a folder's images."""

    file: ShardFile
    start: int = 0
    """Its first row in the index of the file."""
    rows: int
    kept: NDArray[np.int64] | None = None
    """The rows that meet the conditions, counted from its first; None is all."""

    def __len__(self) -> int:
        return self.rows if self.kept is None else len(self.kept)


@dataclass(eq=False, repr=False)
class Source:
    """The samples of a source in their order; `open_source` makes one.

    Shards are opened when a sample of theirs is read. It can be sent to another process.
    """

    config: SourceConfig
    shards: Sequence[Shard]
    verify: Verify
    keep_open: int
    cache: NodeCache

    def __post_init__(self) -> None:
        self._ends = list(accumulate(map(len, self.shards)))
        self._index = _remembered(self._read_index, self.keep_open)
        self._tar = _remembered(self._open_tar, self.keep_open)

    def __reduce__(self) -> tuple[type["Source"], tuple[Any, ...]]:
        """Open the shards anew in another process: a memory map cannot be sent to one."""
        return type(self), (self.config, self.shards, self.verify, self.keep_open, self.cache)

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"the split {self.config.split!r} of {shown(self.config.path)}"

    @property
    def sizes(self) -> list[int]:
        """The number of samples in each shard."""
        return list(map(len, self.shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def fingerprint(self) -> str:
        """Names what is read, wherever it lies: every shard's name, bytes and number of samples."""
        digest = hashlib.sha256()
        for shard in self.shards:
            file = shard.file
            content = file.state.get("sha256", file.size)
            line = [os.path.basename(file.name), file.prefix, content, len(shard)]
            digest.update(f"{line}\n".encode())
        return digest.hexdigest()

    def keeping_open(self, number: int) -> "Source":
        """Return the same source with at most `number` shards open in a process."""
        return replace(self, keep_open=min(number, self.keep_open))

    def prefetch(self, shards: Iterable[int]) -> None:
        """Begin to fetch shards of a remote source that are read next.

        Nothing is done where the cache has no room for all of them.
        """
        if not self.shards or not self.shards[0].file.is_remote:
            return
        tars = {n: self.shards[n].file for n in shards if self.shards[n].file.is_tar}
        if sum(file.size for file in tars.values()) <= self.cache.max_bytes:
            self.cache.prefetch(each for n in tars for each in self._files_of(n))

    def _files_of(self, number: int) -> list[RemoteFile]:
        """Return what is fetched to read from a tar at a place."""
        file = self.shards[number].file
        tar = remote_file(file, sha256=self._noted_hash(number))
        return [remote_index(file), tar] if file.entry else [tar]

    def _noted_hash(self, number: int) -> str | None:
        """Return the SHA-256 that a remote tar in no manifest had when its index was made."""
        if self.shards[number].file.entry:
            return None
        sha256: str | None = about_index(self._index(number).table).get("sha256")
        return sha256

    def at(self, shard: int, row: int) -> Sample:
        """Return the sample in a row of a shard.

        Raises:
            ShardError: the shard is missing or damaged.
            DataError: the sample cannot be used.
            PlaceError: the shard cannot be fetched, or not be kept here.
        """
        at = self._row(shard, row)
        found = {name: column[at].as_py() for name, column in self._index(shard).columns.items()}
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
            address=self.address(shard, row),
        )

    def __getitem__(self, index: int) -> Sample:
        """Return the sample at `index` in [0, len); errors as in `at`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._ends, index)
        return self.at(shard, index - self._ends[shard] + len(self.shards[shard]))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def address(self, shard: int, row: int) -> str:
        """Return where a sample lies: the file of its image, or `SHARD#ROW`, rows from 0."""
        at, place = self._row(shard, row), self.shards[shard]
        with suppress(ShardError):
            if (path := self._index(shard).columns["path"][at].as_py()) is not None:
                return as_text(os.fsdecode(path))
        return f"{place.file.name}#{place.start + at}"

    def uid(self, shard: int, row: int) -> str:
        """Return the uid of a sample, also of one that cannot be used; empty without an index."""
        at = self._row(shard, row)
        with suppress(ShardError):
            uid: str = self._index(shard).columns["uid"][at].as_py()
            return uid
        return ""

    def _image(self, shard: int, found: Mapping[str, Any]) -> bytes:
        if found["image"] is not None:
            image: bytes = found["image"]
            return image
        if found["path"] is None:
            return bytes_in(self._tar(shard), found["start"], found["size"])
        path = Path(os.fsdecode(found["path"]))
        try:
            return read_file(path, MAX_BYTES)
        except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{as_text(str(path))} cannot be read: {reason}") from error

    def rows(self, shard: int, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Return some columns of the index of a shard, a row a sample."""
        rows: list[dict[str, Any]] = self._kept(shard, columns).to_pylist()
        return rows

    def _kept(self, shard: int, columns: Sequence[str] = ("uid",)) -> pyarrow.Table:
        kept = self.shards[shard].kept
        table = self._index(shard).table.select(list(columns))
        return table if kept is None else table.take(kept)

    def label_ids(self, key: str, shard: int) -> NDArray[np.int64]:
        """Return a number for a label of each sample of a shard, equal where that is equal."""
        labels = [dict(row["labels"] or ()).get(key, "") for row in self.rows(shard, ["labels"])]
        ids = {label: text_id(label) for label in set(labels)}
        return np.array([ids[label] for label in labels], np.int64)

    def damaged(self) -> list[tuple[int, str]]:
        """Return why samples cannot be read, and how many: those of a damaged shard together.

        Where there is much to read, several processes do it; a bar is shown on a terminal.
        """
        found = over(
            self._damaged_in,
            range(len(self.shards)),
            size=len(self) * TYPICAL_BYTES,
            title=f"checking {self.config.split}",
        )
        return [each for of_shard in found for each in of_shard]

    def _damaged_in(self, shard: int) -> list[tuple[int, str]]:
        found: list[tuple[int, str]] = []
        rows = len(self.shards[shard])
        for row in range(rows):
            try:
                sample = self.at(shard, row)
                decode_image(sample.image, name=f"{sample.uid} ({sample.address})")
            except ShardError as error:
                return [*found, (rows - row, str(error))]
            except DataError as error:
                found.append((1, str(error)))
        return found

    def check_uids(self) -> None:
        """Refuse, by a `DataError`, uids that occur twice; the index of every shard is read."""
        check_uids([
            (shard.file.name, partial(self._kept, n)) for n, shard in enumerate(self.shards)
        ])  # fmt: skip

    def where(self, where: Sequence[str]) -> "Source":
        """Return the samples that meet all conditions; the index of every shard is read.

        Raises:
            DataError: one is not a condition, or asks for a key that no sample has.
        """
        conditions = Conditions(where)
        chosen = self._choose(conditions.rows_of)
        conditions.check_keys(self.name)
        return chosen

    def of_split(self) -> "Source":
        """Return the samples of the split, if the source is a table with a column of splits.

        Raises:
            DataError: there is no such split.
        """
        split = self.config.split
        columns = [self._index(n).table["split"] for n in range(len(self.shards))]
        known = {name for column in columns for name in column.unique().to_pylist() if name}
        if not known and split == DEFAULT_SPLIT:
            return self
        if split not in known:
            has = f"its splits are {listed(sorted(known))}" if known else "it has no splits"
            raise DataError(f"{self.config.path} has no split {split!r}; {has}")
        return self._choose(
            lambda table: np.flatnonzero(table["split"].to_numpy(zero_copy_only=False) == split)
        )

    def _choose(self, rows_of: Callable[[pyarrow.Table], NDArray[np.int64]]) -> "Source":
        """Return the samples in some rows of each index; what has none left is no shard."""
        shards = []
        for number, shard in enumerate(self.shards):
            kept = rows_of(self._index(number).table)
            if shard.kept is not None:
                kept = np.intersect1d(kept, shard.kept)
            if len(kept):
                shards.append(replace(shard, kept=kept))
        return replace(self, shards=shards)

    def _row(self, shard: int, row: int) -> int:
        """Return where a row lies in the shard's part of the index."""
        if not 0 <= row < len(self.shards[shard]):
            raise IndexError(row)
        kept = self.shards[shard].kept
        return row if kept is None else int(kept[row])

    def _read_index(self, number: int) -> "_Index":
        """Return a shard's part of its index; a tar is not opened for it if it has one."""
        shard = self.shards[number]
        table = index_of(shard.file, self.config, self.cache).slice(shard.start, shard.rows)
        return _Index(table, dict(zip(SCHEMA.names, table.columns, strict=True)))

    def _open_tar(self, number: int) -> bytes | mmap.mmap:
        file, sha256 = self.shards[number].file, self._noted_hash(number)
        with local_copy(file, self.cache, sha256=sha256, verify=self.verify) as path:
            return tar_content(path)


class _Index(NamedTuple):
    table: pyarrow.Table
    columns: dict[str, pyarrow.ChunkedArray]
    """Those of the table: to look one up there takes as long as to read a value of it."""


def _remembered(call: Callable[[int], _T], most: int) -> Callable[[int], _T]:
    """Remember the last results of a call for a shard, errors too: it is looked through once."""

    @lru_cache(most)
    def tried(number: int) -> _T | ShardError:
        try:
            return call(number)
        except ShardError as error:
            return error

    def remembered(number: int) -> _T:
        found = tried(number)
        if isinstance(found, ShardError):
            raise ShardError(str(found))
        return found

    return remembered


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
    source = Source(config, _shards_of(layout, config, cache), verify, keep_open, cache)
    if layout.kind == "tables":
        source = source.of_split()
    if config.where:
        source = source.where(config.where)
    if not len(source):
        reason = f"has no sample where {' and '.join(config.where)}" if config.where else "is empty"
        raise DataError(f"{source.name} {reason}")
    return source


def _shards_of(layout: Layout, config: SourceConfig, cache: NodeCache) -> list[Shard]:
    """Return a tar as one shard, and a table or the images of a folder in shards of `ROWS` rows."""
    if len(layout.files) <= _COMPARED:
        for file in layout.files:
            if file.entry and not file.is_remote:
                check_unchanged(file)
    shards = []
    for file, rows in zip(layout.files, row_counts(layout, config, cache), strict=True):
        size = rows if file.is_tar else ROWS
        # Paths of images were for the index; without them a source is small to send.
        shards += [
            Shard(file=replace(file, images=()), start=start, rows=min(size, rows - start))
            for start in range(0, rows, size or 1)
        ]
    return shards
