"""The shards of a source, and how many samples each has: of a manifest, or of indexes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlm.data.config import SourceConfig
from vlm.data.index import ROWS
from vlm.data.indexing import cached_indexes, index_path
from vlm.data.layout import Layout, ShardFile
from vlm.storage.node_cache import NodeCache

_COMPARED = 10_000  # shards whose sizes are compared at the start; of more, each when it is opened


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Samples that are opened together: a tar, or some rows of a table or of a folder's images."""

    file: ShardFile
    index: Path | None
    """The file of its index; where a tar with an entry has none there, it is scanned. None for one
    with an entry at a place: `fetched_index` finds it."""
    start: int = 0
    """Its first row in the index."""
    rows: int
    kept: NDArray[np.int64] | None = None
    """The rows that meet the conditions, counted from its first; None is all."""

    def __len__(self) -> int:
        return self.rows if self.kept is None else len(self.kept)


def shards_of(layout: Layout, config: SourceConfig, cache: NodeCache) -> list[Shard]:
    """Return the shards of a source, with the number of samples in each."""
    if layout.kind == "data folder":
        shards = []
        for file in layout.files:
            assert file.entry is not None, "it is from a manifest"
            index = None
            if not file.is_remote:
                path = Path(file.path)
                index = index_path(path.parent, path.name)
                if len(layout.files) <= _COMPARED:
                    file.entry.path_in(path.parent)
            shards.append(Shard(file=file, index=index, rows=file.entry.samples))
        return shards
    return [
        shard
        for file, found in zip(layout.files, cached_indexes(layout, config, cache), strict=True)
        for shard in _cut(replace(file, images=()), *found)
    ]


def _cut(file: ShardFile, index: Path, rows: int) -> Iterator[Shard]:
    """Give a tar as one shard, and a table in shards of `ROWS` rows."""
    size = rows if file.is_tar else ROWS
    for start in range(0, rows, size or 1):
        yield Shard(file=file, index=index, start=start, rows=min(size, rows - start))
