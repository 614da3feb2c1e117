"""Which samples each rank reads: a pure function of (seed, position)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlm.errors import ConfigError

_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GAMMA = np.array([0x9E3779B97F4A7C15], np.uint64)  # an array, whose products wrap in silence


class ExampleKey(NamedTuple):
    """Names one example: everything random about it follows from the key and the seed."""

    epoch: int
    place: int
    """The sample's index in the split."""


@dataclass(frozen=True, slots=True)
class BatchOrder:
    """Which examples one rank reads, batch by batch.

    The samples of all epochs form one endless sequence; global batch `k` is its positions
    `[k * B, (k + 1) * B)`, of which rank `r` of `n` reads the `r`-th part. The state of the data
    is therefore one integer, the number of samples read, and does not depend on `n`.

    Raises:
        ConfigError: the batch is larger than the data, or no multiple of the process count.
    """

    size: int
    """Number of samples in an epoch."""
    global_batch_size: int
    """Samples that all ranks together read in one step."""
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.global_batch_size <= self.size:
            raise ConfigError(
                f"the batch has {self.global_batch_size} samples; expected 1 to {self.size}, "
                "the number of samples in the data"
            )
        if self.global_batch_size % self.world_size:
            raise ConfigError(
                f"the batch has {self.global_batch_size} samples; expected a multiple of "
                f"{self.world_size}, the number of processes"
            )

    def batches(self, *, first_sample: int, last_sample: int) -> Iterator[list[ExampleKey]]:
        """Give this rank's batches between two positions of the endless sequence."""
        local = self.global_batch_size // self.world_size
        for start in range(first_sample, last_sample, self.global_batch_size):
            first = start + self.rank * local
            places = (divmod(position, self.size) for position in range(first, first + local))
            yield [
                ExampleKey(epoch, int(epoch_order(self.size, seed=self.seed, epoch=epoch)[rest]))
                for epoch, rest in places
            ]


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def epoch_order(size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return a permutation of range(size) that depends on its arguments alone; seeds modulo 2**64.

    Every index is given a SplitMix64 hash (Steele, Lea and Flood 2014) of itself and of (seed,
    epoch), and the hashes are sorted: the same order in every process, numpy and torch version.
    """
    stream = _mix(_mix(np.array([seed % 2**64], np.uint64) + _GAMMA) + np.uint64(epoch) * _GAMMA)
    keys = _mix(np.arange(size, dtype=np.uint64) * _GAMMA + stream)
    return np.argsort(keys, kind="stable").astype(np.int64)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))
