"""Samples of any source by their index, read from shards that are opened when they are needed."""

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray

from vlm.data.conditions import Conditions
from vlm.data.config import DEFAULT_SPLIT, SourceConfig, Verify
from vlm.data.index import ROWS, read_index, table_of
from vlm.data.indexing import about, cached_indexes, check_uids, index_path
from vlm.data.layout import Layout, ShardFile, layout_of
from vlm.data.records import as_text, listed
from vlm.data.sample import Sample
from vlm.data.scanning import bytes_in, scan_tar, tar_content
from vlm.errors import DataError, ShardError
from vlm.files import read_file
from vlm.images.decoding import MAX_BYTES, decode_image
from vlm.text.caption_ids import text_id


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    """Samples that are opened together: a tar, or some rows of a table or of a folder's images."""

    file: ShardFile
    index: Path
    """The file of its index; a tar with an entry may have none there, and is scanned."""
    start: int = 0
    """Its first row in the index."""
    rows: int
    kept: NDArray[np.int64] | None = None
    """The rows that meet the conditions, counted from its first; None is all."""

    def __len__(self) -> int:
        return self.rows if self.kept is None else len(self.kept)


class Source:
    """The samples of a source in their order; `open_source` makes one.

    Shards are opened when a sample of theirs is read. It can be sent to another process.
    """

    def __init__(
        self, config: SourceConfig, shards: Sequence[_Shard], verify: Verify, keep_open: int
    ) -> None:
        self.config = config
        self._shards = shards
        self._settings = (verify, keep_open)
        self._ends = list(accumulate(map(len, shards)))
        self._tried = lru_cache(keep_open)(self._try_to_open)

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"the split {self.config.split!r} of {self.config.path}"

    @property
    def sizes(self) -> list[int]:
        """The number of samples in each shard."""
        return list(map(len, self._shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def at(self, shard: int, row: int) -> Sample:
        """Return the sample in a row of a shard.

        Raises:
            ShardError: the shard is missing or damaged.
            DataError: the sample cannot be used.
        """
        return self._opened(shard).sample(self._row(shard, row))

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
        found, row = self._shards[shard], self._row(shard, row)
        with suppress(ShardError):
            return self._opened(shard).address(row)
        return f"{found.file.path}#{found.start + row}"

    def rows(self, shard: int, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Return some columns of the index of a shard, a row a sample."""
        kept = self._shards[shard].kept
        table = self._opened(shard).table.select(list(columns))
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
            [(shard.file.path, partial(self._uids, n)) for n, shard in enumerate(self._shards)]
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
        chosen = self._with(
            [conditions.rows_of(self._opened(n).table) for n in range(len(self._shards))]
        )
        conditions.check_keys(self.name)
        return chosen

    def of_split(self) -> "Source":
        """Return the samples of the split, if the source is a table with a column of splits.

        Raises:
            DataError: there is no such split.
        """
        splits = [
            self._opened(n).table["split"].to_numpy(zero_copy_only=False)
            for n in range(len(self._shards))
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

    def _opened(self, number: int) -> "_OpenShard":
        found = self._tried(number)
        if isinstance(found, ShardError):
            raise ShardError(str(found))
        return found

    def _try_to_open(self, number: int) -> "_OpenShard | ShardError":
        try:
            return self._open(number)
        except ShardError as error:  # kept, so that a damaged shard is looked through once
            return error

    def _open(self, number: int) -> "_OpenShard":
        shard = self._shards[number]
        file, content = shard.file, None
        table = read_index(shard.index, about(file, self.config))
        if file.is_tar:
            path = local_path(file)
            if file.entry:
                file.entry.verify(path, self._settings[0])
            if file.entry and table is None:
                content, rows = scan_tar(path, self.config, prefix=file.prefix)
                table = table_of(rows)
            else:
                content = tar_content(path)
        if file.entry and table is not None and len(table) != shard.rows:
            raise ShardError(
                f"shard {file.path} holds {len(table)} samples, the manifest says {shard.rows}"
            )
        if table is None or len(table) < shard.start + shard.rows:
            raise ShardError(f"{shard.index}, the index of {file.path}, is gone; open it anew")
        return _OpenShard(file.path, shard.start, table.slice(shard.start, shard.rows), content)


def open_source(config: SourceConfig, *, verify: Verify = "once", keep_open: int = 200) -> Source:
    """Open what a source names: manifests and counts are read, and no samples.

    What has no manifest is looked through when it is first opened, in several processes and with a
    bar on a terminal; what was found is kept in the cache folder as long as nothing changes.

    Args:
        config: The source.
        verify: When the hashes of a data folder's shards are compared with its manifest.
        keep_open: Shards that each process keeps open; packed ones are in memory then.

    Raises:
        DataError: nothing is there, it is of no known kind or damaged, or no sample is left.
        VlmError: the cache folder cannot be written to.
    """
    layout = layout_of(config)
    source = Source(config, _listed(layout, config), verify, keep_open)
    if layout.kind == "tables":
        source = source.of_split()
    if config.where:
        source = source.where(config.where)
    if not len(source):
        reason = f"has no sample where {' and '.join(config.where)}" if config.where else "is empty"
        raise DataError(f"{source.name} {reason}")
    return source


def local_path(file: ShardFile) -> Path:
    """Return where the bytes of a tar lie on this machine.

    Raises:
        ShardError: it is missing, or not what it was when it was listed.
    """
    if file.entry:
        return file.entry.path_in(file.path.parent)
    try:
        found = file.path.stat()
    except OSError as error:
        raise ShardError(f"shard {file.path} cannot be read: {error.strerror}") from error
    if file.state != {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns}:
        raise ShardError(f"shard {file.path} has changed since the source was opened")
    return file.path


@dataclass(frozen=True, slots=True)
class _OpenShard:
    """The rows of a shard's index, and the bytes of a tar."""

    path: Path
    start: int
    table: pyarrow.Table
    content: bytes | mmap.mmap | None

    def sample(self, row: int) -> Sample:
        """Return the sample in a row; a `DataError` if it cannot be used."""
        found = self._row(row)
        if found["error"] is not None:
            raise DataError(found["error"])
        return Sample(
            uid=found["uid"],
            image=self._image(found),
            captions=dict(found["captions"]),
            concept=found["concept"],
            source=found["source"],
            licence=found["licence"],
            labels=dict(found["labels"]),
            address=self._address(found, row),
        )

    def address(self, row: int) -> str:
        return self._address(self._row(row), row)

    def _row(self, row: int) -> dict[str, Any]:
        found: dict[str, Any] = self.table.slice(row, 1).to_pylist()[0]
        return found

    def _address(self, found: Mapping[str, Any], row: int) -> str:
        if found["path"] is not None:
            return as_text(os.fsdecode(found["path"]))
        return f"{self.path}#{self.start + row}"

    def _image(self, found: Mapping[str, Any]) -> bytes:
        if found["image"] is not None:
            image: bytes = found["image"]
            return image
        if found["path"] is None:
            assert self.content is not None, "only the images of tars are in neither"
            return bytes_in(self.content, found["start"], found["size"])
        path = Path(os.fsdecode(found["path"]))
        try:
            return read_file(path, MAX_BYTES)
        except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{as_text(str(path))} cannot be read: {reason}") from error


def _listed(layout: Layout, config: SourceConfig) -> list[_Shard]:
    """Return the shards of a source, with the number of samples in each."""
    if layout.kind == "data folder":
        shards = []
        for file in layout.files:
            assert file.entry is not None, "it is from a manifest"
            local_path(file)
            index = index_path(file.path.parent, file.path.name)
            shards.append(_Shard(file=file, index=index, rows=file.entry.samples))
        return shards
    return [
        shard
        for file, found in zip(layout.files, cached_indexes(layout, config), strict=True)
        for shard in _cut(replace(file, images=()), *found)
    ]


def _cut(file: ShardFile, index: Path, rows: int) -> Iterator[_Shard]:
    """Give a tar as one shard, and a table in shards of so many rows."""
    size = rows if file.is_tar else ROWS
    for start in range(0, rows, size or 1):
        yield _Shard(file=file, index=index, start=start, rows=min(size, rows - start))
