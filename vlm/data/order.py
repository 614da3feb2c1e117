"""The order of samples as a pure function of (seed, epoch, position)."""

import numpy as np
from numpy.typing import NDArray

_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GAMMA = np.array([0x9E3779B97F4A7C15], np.uint64)  # an array, whose products wrap in silence


def epoch_order(size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return a permutation of range(size) that depends on its arguments alone.

    Seeds count modulo 2**64.

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
