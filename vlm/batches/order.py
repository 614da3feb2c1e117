"""The order in which one source is read: a pure function of shard sizes, streams and a seed.

Memory is that of a block of each stream, whatever the size of the data.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlm.errors import ConfigError
from vlm.text.caption_ids import text_id

BLOCK = 1 << 18
"""Samples that are shuffled together, at least: about 27 shards of 10,000."""

_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GAMMA = np.array([0x9E3779B97F4A7C15], np.uint64)  # an array, whose products wrap in silence


class SampleKey(NamedTuple):
    """Names one sample that is read: where it lies, and where in the order it comes."""

    source: int
    shard: int
    row: int
    epoch: int
    """How often its stream has read all that it reads of the source."""
    stream: int
    place: int
    """How many samples its stream has read of the source in this epoch."""


class _Block(NamedTuple):
    """Neighbouring shards, or parts of them, whose samples are read in a random order."""

    epoch: int
    first: int
    """The place in the epoch of its stream where it begins."""
    shards: NDArray[np.int32]
    rows: NDArray[np.int64]
    """The first row of each shard's part."""
    starts: NDArray[np.int64]
    """Where each part begins in the block."""
    order: NDArray[np.int32]


class _Parts(NamedTuple):
    """The same before its samples are permuted."""

    number: int
    """How many blocks of its stream come before it in the epoch."""
    first: int
    size: int
    shards: NDArray[np.int32]
    rows: NDArray[np.int64]
    starts: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SourceOrder:
    """The endless order in which streams read one source.

    In every epoch the shards are permuted whole, and stream `c` of `C` reads the `c`-th part of
    that sequence: every sample is read once an epoch, and a node that reads some streams touches
    the shards of those alone. Within a block of neighbouring shards samples are permuted.

    Args:
        name: Names the source: its order stays where others join or leave.
        sizes: Samples of each shard.
        streams: Number of streams, which determines the order.
        seed: Modulo 2**64.
        block: Samples that are shuffled together, at least.
        groups: Gives the group of each row of a shard, if neighbours in the order are to be of one.
        run: How many neighbours.

    Raises:
        ConfigError: there are fewer samples than streams.
    """

    name: str
    sizes: NDArray[np.int64]
    streams: int = 1
    seed: int = 0
    block: int = BLOCK
    groups: Callable[[int], NDArray[np.int64]] | None = None
    run: int = 1
    _blocks: dict[int, _Block] = field(default_factory=dict, init=False, repr=False)
    """The block that each stream read last."""

    def __post_init__(self) -> None:
        if not 0 < self.streams <= self.size:
            raise ConfigError(
                f"the source {self.name!r} has {self.size} samples for {self.streams} streams; "
                "expected at least one for each"
            )

    @property
    def size(self) -> int:
        """The number of samples in an epoch."""
        return int(self.sizes.sum())

    @property
    def open_shards(self) -> int:
        """How many shards are open where one stream is read: those of a block, and a few more."""
        return max(int(1.2 * self.block * len(self.sizes) / self.size), 2)

    def span(self, stream: int) -> tuple[int, int]:
        """Return where a stream's part of an epoch begins and ends, in samples."""
        return stream * self.size // self.streams, (stream + 1) * self.size // self.streams

    def read(self, source: int, stream: int, first: int, count: int) -> Iterator[SampleKey]:
        """Give `count` samples of a stream after its first `first`; `source` goes into the keys."""
        start, end = self.span(stream)
        while count > 0:
            epoch, place = divmod(first, end - start)
            block = self._block_at(stream, epoch, place)
            inside = place - block.first
            positions = block.order[inside : inside + count]
            parts = np.searchsorted(block.starts, positions, side="right") - 1
            rows = positions - block.starts[parts] + block.rows[parts]
            for shard, row in zip(block.shards[parts].tolist(), rows.tolist(), strict=True):
                yield SampleKey(source, shard, row, epoch, stream, place)
                place += 1
            first, count = first + len(positions), count - len(positions)

    def substitute(self, key: SampleKey, attempt: int) -> SampleKey:
        """Return another sample of a sample's block, chosen by the key and the attempt."""
        block = self._block_at(key.stream, key.epoch, key.place)
        names = (self.seed, text_id(self.name), key.epoch, key.stream, key.place, attempt)
        place = block.first + int(_hash(np.zeros(1, np.uint64), *names)[0]) % len(block.order)
        first = key.epoch * (self.span(key.stream)[1] - self.span(key.stream)[0]) + place
        return next(self.read(key.source, key.stream, first, 1))

    def __reduce__(self) -> tuple[Any, ...]:
        """Send no blocks to worker processes, which need them only where a sample is damaged."""
        return type(self), (
            self.name, self.sizes, self.streams, self.seed, self.block, self.groups, self.run
        )  # fmt: skip

    def shards_from(self, key: SampleKey) -> list[int]:
        """Return the shards of a sample's block, and then those of the next one of its stream."""
        start, end = self.span(key.stream)
        own = self._parts(key.stream, key.epoch, key.place)
        after = own.first + own.size
        more = (key.epoch, after) if after < end - start else (key.epoch + 1, 0)
        shards = [*own.shards.tolist(), *self._parts(key.stream, *more).shards.tolist()]
        return list(dict.fromkeys(shards))

    def _block_at(self, stream: int, epoch: int, place: int) -> _Block:
        known = self._blocks.get(stream)
        if known and known.epoch == epoch and 0 <= place - known.first < len(known.order):
            return known
        found = self._parts(stream, epoch, place)
        names = (self.seed, text_id(self.name), epoch, stream)
        order = permutation(found.size, *names, found.number)
        if self.groups is not None:
            sizes = np.diff(np.append(found.starts, found.size))
            parts = zip(found.shards.tolist(), found.rows.tolist(), sizes.tolist(), strict=True)
            groups = [self.groups(shard)[row : row + rows] for shard, row, rows in parts]
            order = _in_runs(order, np.concatenate(groups), self.run, *names, found.number)
        block = _Block(epoch, found.first, found.shards, found.rows, found.starts, order)
        self._blocks[stream] = block
        return block

    def _parts(self, stream: int, epoch: int, place: int) -> _Parts:
        """Return what the block with a place consists of."""
        start, end = self.span(stream)
        shards, ends = _shard_order(self, epoch)
        # The shards that lie in this stream's part, the outer two perhaps in part only.
        inside = slice(np.searchsorted(ends, start, "right"), np.searchsorted(ends, end) + 1)
        shards, ends = shards[inside], ends[inside]
        begins = np.maximum(ends - self.sizes[shards], start)
        stops = np.minimum(ends, end) - start
        number, left, first = 0, 0, 0
        while True:  # the shards of block after block, up to the one with the place
            right = min(int(np.searchsorted(stops, first + self.block)) + 1, len(stops))
            if place < stops[right - 1]:
                break
            number, left, first = number + 1, right, int(stops[right - 1])
        of = slice(left, right)
        return _Parts(
            number=number,
            first=first,
            size=int(stops[right - 1]) - first,
            shards=shards[of],
            rows=(begins - (ends - self.sizes[shards]))[of],
            starts=begins[of] - start - first,
        )


@lru_cache(maxsize=16)  # of a few sources; streams of different lengths may be an epoch apart
def _shard_order(order: SourceOrder, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return an epoch's sequence of shards, and the samples up to the end of each."""
    shards = permutation(len(order.sizes), order.seed, text_id(order.name), epoch)
    return shards, np.cumsum(order.sizes[shards])


def _in_runs(
    order: NDArray[np.int32], groups: NDArray[np.int64], run: int, *names: int
) -> NDArray[np.int32]:
    """Sort an order by group, and permute runs of neighbours, which share one group or few."""
    hashes = _hash(groups[order].astype(np.uint64), *names)
    sorted_order = order[np.argsort(hashes, kind="stable")]
    whole = len(order) // run * run  # what is left over comes last
    runs = sorted_order[:whole].reshape(-1, run)[permutation(whole // run, *names, run)]
    return np.concatenate([runs.reshape(-1), sorted_order[whole:]])


def permutation(size: int, *names: int) -> NDArray[np.int32]:
    """Return a permutation of range(size), below 2**31, that depends on its arguments alone.

    Every index is given a SplitMix64 hash (Steele, Lea and Flood 2014) of itself and of the names,
    and the hashes are sorted: the same order in every process, numpy and torch version.
    """
    indices = np.arange(size, dtype=np.uint64)
    # The low bits give way to the index, so that sorting the hashes sorts the indices as well.
    low = np.uint64((1 << max(size - 1, 1).bit_length()) - 1)
    keys = _hash(indices, *names) & ~low | indices
    keys.sort()
    return (keys & low).astype(np.int32)


def _hash(values: NDArray[np.uint64], *names: int) -> NDArray[np.uint64]:
    stream = np.zeros(1, np.uint64)
    for name in names:
        stream = _mix(stream + np.uint64(name % 2**64) + _GAMMA)
    return _mix(values * _GAMMA + stream)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))
