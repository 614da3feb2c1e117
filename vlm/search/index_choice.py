"""Which index suits, by size, memory and recall, and how far its search parameter must go."""

import math
from collections.abc import Callable

from vlm.errors import SearchIndexError

AUTO = "auto"
"""Stands for the factory that `choose_factory` names."""

FLAT_BELOW = 10_000
"""Vectors below which exact search is quick enough for anyone."""

_HNSW_LINKS = 32
_UPPER_LAYERS = 16  # bytes: offsets, levels, and links of the few vectors that lie higher
_ID_BYTES = 8
_FEWEST_POINTS = 39  # a centroid, below which FAISS warns


def choose_factory(
    count: int, dim: int, *, memory_budget_bytes: int, target_recall: float = 0.95
) -> str:
    """Return the factory string of an index that suits, the first in this list that fits.

    After the FAISS wiki's "Guidelines to choose an index", with its sizes a vector:

    1. `Flat`, 4 dim bytes: below 10,000 vectors, or where a recall of 1 is asked for, which
       nothing else can promise.
    2. `HNSW32`, 4 dim + 256 bytes and a little more for the upper layers: best recall in a time.
    3. `IVFn,Flat`, 4 dim + 8 bytes; of cells, n is the power of two from 4 sqrt(count) on, or
       less where a cell would have fewer than 39 vectors to be trained on.
    4. `IVFn,SQ8`, dim + 8 bytes.
    5. `IVFn,PQmnp`, m + 8 bytes, for m of dim / 2, dim / 4, dim / 8, from 256 vectors on. The
       guidelines put a rotation (OPQ) before it, whose training takes minutes; `np` leaves out
       the polysemous training, whose use is a filter that is not set. A high recall may be out
       of its reach: what tunes it says so.

    Args:
        count: Number of vectors, at least 1.
        dim: Their width, at least 1.
        memory_budget_bytes: Bytes that the whole index may take.
        target_recall: Share in (0, 1] of the nearest neighbours that are to be found.

    Raises:
        SearchIndexError: the arguments are out of their ranges, or nothing fits.
    """
    if count < 1 or dim < 1 or not 0 < target_recall <= 1:
        raise SearchIndexError(
            f"cannot choose an index of {count} vectors of width {dim} for a recall of "
            f"{target_recall}; expected at least one of each, and a share above 0 and up to 1"
        )
    cells = _cells(count)
    centroids = cells * 4 * dim
    sizes = {"Flat": count * 4 * dim} if count < FLAT_BELOW or target_recall == 1 else {}
    if target_recall < 1:
        sizes["HNSW32"] = count * (4 * dim + 8 * _HNSW_LINKS + _UPPER_LAYERS)
        sizes[f"IVF{cells},Flat"] = count * (4 * dim + _ID_BYTES) + centroids
        sizes[f"IVF{cells},SQ8"] = count * (dim + _ID_BYTES) + centroids
        for part in (2, 4, 8) if count >= 256 else ():
            if dim % part == 0:
                codebook = 256 * 4 * dim
                size = count * (dim // part + _ID_BYTES) + centroids + codebook
                sizes[f"IVF{cells},PQ{dim // part}np"] = size
    for factory, size in sizes.items():
        if size <= memory_budget_bytes:
            return factory
    factory, size = min(sizes.items(), key=lambda item: item[1])
    raise SearchIndexError(
        f"no index of {count} vectors of width {dim} for a recall of {target_recall} fits into "
        f"{memory_budget_bytes} bytes; expected at least {size}, for {factory}"
    )


def smallest_reaching(recall_of: Callable[[int], float], *, high: int, target: float) -> int:
    """Return by bisection the smallest number from 1 to `high` whose recall reaches the target.

    Recall is taken to grow with the number, as it does but for noise. Where not even `high`
    reaches the target, it is the smallest number that does as well as `high`.
    """
    target = min(target, recall_of(high))
    low = 1
    while low < high:
        middle = (low + high) // 2
        if recall_of(middle) >= target:
            high = middle
        else:
            low = middle + 1
    return low


def _cells(count: int) -> int:
    wanted = math.ceil(math.log2(4 * math.sqrt(count)))
    trainable = math.floor(math.log2(max(1, count // _FEWEST_POINTS)))
    return int(2 ** min(wanted, trainable))
