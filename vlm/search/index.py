"""`VectorIndex`: any FAISS index of unit vectors, exact or approximate, and which one suits."""

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
from jaxtyping import Float32, Int, Int64

from vlm.errors import SearchIndexError

AUTO = "auto"
"""Stands for the factory that `choose_factory` names."""

FLAT_BELOW = 10_000
"""Vectors below which exact search is quick enough for anyone."""

ROUNDING = 1e-6
"""Products of unit vectors in float32 agree to this."""

_HNSW_LINKS = 32
_UPPER_LAYERS = 16  # bytes: offsets, levels, and links of the few vectors that lie higher
_ID_BYTES = 8
_FEWEST_POINTS = 39  # a centroid, below which FAISS warns
_TRAINING_POINTS = 256  # a centroid, beyond which k-means of FAISS draws a sample itself
_TUNABLE = ("nprobe", "efSearch", "k_factor_rf")  # in the order of what they decide
_ROWS = 2048  # queries whose hits are looked at together


@dataclass(frozen=True, slots=True)
class Hits:
    """What a search found: row `i` belongs to query `i`, best first."""

    scores: Float32[np.ndarray, "queries k"]
    """Cosines in [-1, 1]; of a compressed index approximately."""
    ids: Int64[np.ndarray, "queries k"]
    """Positions of the vectors in the index; -1 where an approximate index found fewer."""


class Tunable(NamedTuple):
    """The search parameter that trades time for recall: whole numbers from 1 to `high`."""

    name: str
    high: int


class VectorIndex:
    """Unit vectors that can be searched by cosine; the position of a vector is its id.

    Args:
        index: A filled index of FAISS for inner products.
        factory: The string it was made of.
        build_seconds: Time that training and adding took.
        fixed: Search parameters to set, which are not to be tuned.
    """

    def __init__(
        self,
        index: faiss.Index,
        *,
        factory: str = "Flat",
        build_seconds: float = 0.0,
        fixed: Mapping[str, float] | None = None,
    ) -> None:
        self._index = index
        self.factory = factory
        self.build_seconds = build_seconds
        self.on_gpu = False
        self.parameters: dict[str, int | float] = {}
        """The search parameters that were set; FAISS's own defaults are not among them."""
        self.tunable = _tunable_of(index, fixed or {})
        """What can be tuned, if anything."""
        for name, value in (fixed or {}).items():
            self.set_parameter(name, value)

    @classmethod
    def build(
        cls,
        vectors: Float32[np.ndarray, "vectors dim"],
        factory: str = "Flat",
        *,
        seed: int = 0,
        device: str | None = "cpu",
    ) -> "VectorIndex":
        """Build an index for the largest inner products.

        Args:
            vectors: Unit vectors, at least one.
            factory: A string for `faiss.index_factory`, such as `HNSW32`, `IVF256,SQ8` or
                `IVF256,PQ32np,RFlat`; behind an `@`, search parameters that are not to be tuned,
                as in `IVF256,Flat@nprobe=8` or `IVF256,PQ32np,RFlat@k_factor_rf=16`.
            seed: Decides the sample for training where there are more vectors than it needs.
            device: `cpu`, or None for a GPU where there is one and FAISS has this kind for it.

        Raises:
            SearchIndexError: FAISS refuses the string for vectors of this width, these vectors
                are too few to train it or are not finite, or there is no such search parameter.
        """
        unfinite = int((~np.isfinite(vectors).all(axis=1)).sum())
        if not len(vectors) or unfinite:
            raise SearchIndexError(
                f"cannot index {len(vectors)} vectors, {unfinite} of them not finite; expected at "
                "least one, and finite numbers"
            )
        kind, fixed = _parsed(factory)
        vectors = np.ascontiguousarray(vectors)
        index = _empty_index(kind, vectors.shape[1])
        start = time.perf_counter()
        try:
            if not index.is_trained:
                index.train(_training_sample(index, vectors, seed=seed))
            index.add(vectors)
        except RuntimeError as error:
            raise SearchIndexError(
                f"the index {kind} cannot be built from {len(vectors)} vectors: {_reason(error)}"
            ) from error
        seconds = time.perf_counter() - start
        built = cls(index, factory=kind, build_seconds=seconds, fixed=fixed)
        if device != "cpu" and faiss.get_num_gpus() > 0:
            built._move_to_gpu()
        return built

    @classmethod
    def read(cls, path: Path) -> "VectorIndex":
        """Read what `write` wrote; search parameters are in the file."""
        try:
            return cls(faiss.read_index(str(path)))
        except RuntimeError as error:
            raise SearchIndexError(f"{path} cannot be read as a FAISS index") from error

    def write(self, path: Path) -> None:
        """Write the index to a file."""
        # FAISS's own writing hides why a disk refused it.
        path.write_bytes(faiss.serialize_index(self._index).tobytes())

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return int(self._index.d)

    @cached_property
    def bytes_per_vector(self) -> float:
        """Size of its file, divided by the number of vectors."""
        index = faiss.index_gpu_to_cpu(self._index) if self.on_gpu else self._index
        return float(faiss.serialize_index(index).nbytes / len(self))

    def set_parameter(self, name: str, value: int | float) -> None:
        """Set a search parameter by its name in FAISS, such as `nprobe` or `efSearch`."""
        space = faiss.GpuParameterSpace() if self.on_gpu else faiss.ParameterSpace()
        try:
            space.set_index_parameter(self._index, name, value)
        except RuntimeError as error:
            raise SearchIndexError(
                f"the index {self.factory} has no search parameter {name}: {_reason(error)}"
            ) from error
        self.parameters[name] = value

    def tune(self, recall: Callable[[], float], *, target: float) -> bool:
        """Set the tunable parameter to the smallest value that reaches a recall, by bisection.

        FAISS's own AutoTune is not used: it tries powers of two only, and takes another one of
        equal vectors for a miss.

        Args:
            recall: Measures the index as it is; taken to grow with the parameter.
            target: What to reach; if nothing does, the smallest value that does as well as the
                highest is set.

        Returns:
            Whether the target is reached; true for an index that has nothing to tune.
        """
        if self.tunable is None:
            return True
        name, low, high = self.tunable.name, 1, self.tunable.high
        known = dict[int, float]()

        def recall_at(value: int) -> float:
            if value not in known:
                self.set_parameter(name, value)
                known[value] = recall()
            return known[value]

        wanted = min(target, recall_at(high))
        while low < high:
            middle = (low + high) // 2
            if recall_at(middle) >= wanted:
                high = middle
            else:
                low = middle + 1
        self.set_parameter(name, low)
        return recall_at(low) >= target

    def search(self, queries: Float32[np.ndarray, "queries dim"], k: int) -> Hits:
        """Return the `k` best vectors for each query, or all of them if there are fewer."""
        if k < 1:
            raise SearchIndexError(f"found k = {k}; expected at least 1")
        if queries.shape[1] != self.dim:
            raise SearchIndexError(
                f"found queries of {queries.shape[1]} dimensions; expected {self.dim}, those of "
                "the index"
            )
        if not np.isfinite(queries).all():
            raise SearchIndexError("found a query that is not finite; expected unit vectors")
        scores, ids = self._index.search(np.ascontiguousarray(queries), min(k, len(self)))
        return Hits(scores, ids)

    def _move_to_gpu(self) -> None:
        try:
            self._index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, self._index)
        except RuntimeError:  # not a kind for GPUs, such as HNSW, or no room: it works where it is
            return
        self.on_gpu = True
        for name, value in list(self.parameters.items()):
            self.set_parameter(name, value)


def check_factory(factory: str, dim: int) -> None:
    """Refuse a string of `VectorIndex.build` that FAISS does not know for vectors of this width.

    It costs nothing, so that a slip of the pen is found before anything is computed.
    """
    kind, fixed = _parsed(factory)
    VectorIndex(_empty_index(kind, dim), factory=kind, fixed=fixed)


def cosines_of(
    ids: Int[np.ndarray, "queries k"],
    queries: Float32[np.ndarray, "queries dim"],
    vectors: Float32[np.ndarray, "vectors dim"],
) -> Float32[np.ndarray, "queries k"]:
    """Return the true cosines of what a search found; minus infinity for the id -1."""
    found = np.empty(ids.shape, np.float32)
    for start in range(0, len(ids), _ROWS):
        rows = slice(start, start + _ROWS)
        found[rows] = np.einsum("qd,qhd->qh", queries[rows], vectors[ids[rows]])
    found[ids < 0] = -np.inf
    return found


def choose_factory(
    count: int, dim: int, *, memory_budget_bytes: int = 1 << 30, target_recall: float = 0.95
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

    `memory_budget_bytes` is for the whole index; `target_recall`, in (0, 1], is the ratio of the
    nearest neighbours that are to be found.

    Raises:
        SearchIndexError: the arguments are out of their ranges, or nothing fits.
    """
    if count < 1 or dim < 1 or not 0 < target_recall <= 1:
        raise SearchIndexError(
            f"cannot choose an index of {count} vectors of width {dim} for a recall of "
            f"{target_recall}; expected at least one of each, and a recall above 0 and up to 1"
        )
    wanted = math.ceil(math.log2(4 * math.sqrt(count)))
    trainable = math.floor(math.log2(max(1, count // _FEWEST_POINTS)))
    cells = 2 ** min(wanted, trainable)
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


def _parsed(factory: str) -> tuple[str, dict[str, float]]:
    """Split a factory string from the search parameters behind its `@`."""
    kind, _, settings = factory.partition("@")
    parameters = {}
    for each in settings.split(",") if settings else ():
        found = re.fullmatch(r"(\w+)=(\d+(?:\.\d+)?)", each.strip())
        if not found:
            raise SearchIndexError(
                f"{each!r} is no search parameter; expected NAME=NUMBER, such as nprobe=8"
            )
        parameters[found[1]] = float(found[2])
    return kind, parameters


def _empty_index(kind: str, dim: int) -> faiss.Index:
    try:
        if re.search(r"(?<!\d)0+(?!\d)", kind):  # IVF0,SQ8 makes FAISS crash in training
            raise RuntimeError("a size is 0")
        return faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise SearchIndexError(
            f"FAISS cannot make the index {kind!r} for inner products of vectors of width {dim}: "
            f"{_reason(error)}; expected a string such as HNSW32 or IVF256,SQ8"
        ) from error


def _training_sample(
    index: faiss.Index, vectors: Float32[np.ndarray, "vectors dim"], *, seed: int
) -> Float32[np.ndarray, "sample dim"]:
    ivf = faiss.try_extract_index_ivf(index)
    size = _TRAINING_POINTS * max(256, ivf.nlist if ivf else 0)
    if size >= len(vectors):
        return vectors
    rows = np.random.default_rng(seed).choice(len(vectors), size, replace=False)
    return vectors[np.sort(rows)]


def _tunable_of(index: faiss.Index, fixed: Mapping[str, float]) -> Tunable | None:
    """Return what decides most and is not fixed: cells or candidates visited, or re-ranked ones."""
    space = faiss.ParameterSpace()
    space.initialize(index)
    ranges = [space.parameter_ranges.at(n) for n in range(space.parameter_ranges.size())]
    highest = {each.name: int(faiss.vector_to_array(each.values).max(initial=1)) for each in ranges}
    ivf = faiss.try_extract_index_ivf(index)
    for name in (name for name in _TUNABLE if name not in fixed):
        if name == "nprobe" and ivf:  # FAISS's own range leaves its last power of two out
            return Tunable(name, int(ivf.nlist))
        if name in highest and name != "nprobe":
            return Tunable(name, highest[name])
    return None


def _reason(error: RuntimeError) -> str:
    """Return the end of a message of FAISS, which begins with a place in its sources."""
    return re.split(r"\.cpp:\d+: |failed: ", " ".join(str(error).split()))[-1]
