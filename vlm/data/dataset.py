"""The samples of one split by their index, read from verified shards."""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from vlm.data.manifest import read_manifest
from vlm.data.sample import Sample
from vlm.data.shards import check_keys, open_shard
from vlm.errors import DataError
from vlm.images.decoding import decode_image


class ShardedSplit:
    """One split of a data folder; every shard is verified before the first sample is read.

    Args:
        folder: A data folder with a manifest.
        split: Name of the split.

    Raises:
        DataError: the folder, the split or one of its shards is missing or damaged.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = folder
        self.split = split
        entries = read_manifest(folder).shards_of(split, folder)
        self._shards = [open_shard(folder, entry) for entry in entries]
        check_keys(self._shards)
        self._ends = list(accumulate(len(shard) for shard in self._shards))
        if not self._ends or not self._ends[-1]:
            raise DataError(f"the split {split!r} of {folder} is empty")

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def sizes(self) -> list[int]:
        """The number of samples in each shard."""
        return [len(shard) for shard in self._shards]

    def at(self, shard: int, row: int) -> Sample:
        """Return the sample in a row of a shard; a `DataError` if its record is not valid."""
        return self._shards[shard][row]

    def __getitem__(self, index: int) -> Sample:
        """Return the sample at `index` in [0, len); a `DataError` if its record is not valid."""
        return self.at(*self._place(index))

    def address(self, shard: int, row: int) -> str:
        """Return where a sample lies, as `FOLDER/SHARD#ROW`; shards and rows count from 0."""
        return f"{self._shards[shard].path}#{row}"

    def _place(self, index: int) -> tuple[int, int]:
        """Return the number of a sample's shard, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._ends, index)
        return shard, index - self._ends[shard] + len(self._shards[shard])

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def damaged(self) -> Iterator[str]:
        """Give a sentence for every sample whose record or image cannot be read."""
        for index in range(len(self)):
            try:
                sample = self[index]
                decode_image(sample.image, name=f"{sample.uid} ({sample.address})")
            except DataError as error:
                yield str(error)

    def __reduce__(self) -> tuple[type["ShardedSplit"], tuple[Path, str]]:
        """Open the shards anew in a worker process: a memory map cannot be sent to one."""
        return type(self), (self.folder, self.split)
