"""Approximate search: any index that FAISS can build, and what it costs."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import faiss
import numpy as np
from jaxtyping import Float32

from vlm.errors import SearchIndexError
from vlm.search.index import Hits, VectorIndex

_TRAINING_POINTS = 256  # a centroid, beyond which k-means of FAISS draws a sample itself
_TUNABLE = ("nprobe", "efSearch", "k_factor_rf")


@dataclass(frozen=True, slots=True)
class Tunable:
    """The search parameter that trades time for recall: whole numbers from 1 to `high`."""

    name: str
    high: int


class ApproximateIndex:
    """An index of any kind with what it cost; the position of a vector is its id.

    Args:
        index: The index, filled.
        factory: The string it was made of.
        build_seconds: Time that training and adding took.
        bytes_per_vector: Size of its file, divided by the number of vectors.
        tunable: What can be tuned, if anything.
        on_gpu: Whether it lies on a GPU.
    """

    def __init__(
        self,
        index: faiss.Index,
        *,
        factory: str,
        build_seconds: float,
        bytes_per_vector: float,
        tunable: Tunable | None,
        on_gpu: bool = False,
    ) -> None:
        self._index = index
        self.factory = factory
        self.build_seconds = build_seconds
        self.bytes_per_vector = bytes_per_vector
        self.tunable = tunable
        self.on_gpu = on_gpu
        self._parameters: dict[str, int | float] = {}

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def parameters(self) -> Mapping[str, int | float]:
        """The search parameters that were set; FAISS's own defaults are not among them."""
        return dict(self._parameters)

    def set_parameter(self, name: str, value: int | float) -> None:
        """Set a search parameter by its name in FAISS, such as `nprobe` or `efSearch`.

        Raises:
            SearchIndexError: this kind of index has no such parameter.
        """
        space = faiss.GpuParameterSpace() if self.on_gpu else faiss.ParameterSpace()
        try:
            space.set_index_parameter(self._index, name, value)
        except RuntimeError as error:
            raise SearchIndexError(
                f"the index {self.factory} has no search parameter {name}: {_reason(error)}"
            ) from error
        self._parameters[name] = value

    def search(self, queries: Float32[np.ndarray, "queries dim"], k: int) -> Hits:
        """Return up to `k` vectors for each query, best first; where it finds fewer, ids are -1.

        Raises:
            SearchIndexError: the queries have another width, or `k` is less than 1.
        """
        return VectorIndex(self._index).search(queries, k)


def check_factory(factory: str, dim: int) -> None:
    """Refuse a string of `build_index` that FAISS does not know for vectors of this width.

    It costs nothing, so that a slip of the pen is told before anything is computed.

    Raises:
        SearchIndexError: as `build_index`, but for what only the vectors tell.
    """
    kind, _, settings = factory.partition("@")
    index = ApproximateIndex(
        _empty_index(kind, dim), factory=kind, build_seconds=0.0, bytes_per_vector=0.0, tunable=None
    )
    for name, value in _parameters_in(settings).items():
        index.set_parameter(name, value)


def build_index(
    vectors: Float32[np.ndarray, "vectors dim"],
    factory: str,
    *,
    seed: int = 0,
    device: str | None = None,
) -> ApproximateIndex:
    """Build an index for the largest inner products.

    Args:
        vectors: Unit vectors, at least one.
        factory: A string for `faiss.index_factory`, such as `HNSW32`, `IVF256,SQ8` or
            `IVF256,PQ32np,RFlat`; behind an `@`, search parameters that are not to be tuned, as
            in `IVF256,Flat@nprobe=8` or `IVF256,PQ32np,RFlat@k_factor_rf=16`.
        seed: Decides the sample for training where there are more vectors than it needs.
        device: `cpu`, or None for a GPU where there is one and FAISS has this kind for it.

    Raises:
        SearchIndexError: FAISS refuses the string for vectors of this width, these vectors are
            too few to train it or are not finite, or there is no such search parameter.
    """
    if not len(vectors) or not np.isfinite(vectors).all():
        raise SearchIndexError(
            f"cannot index {len(vectors)} vectors, of which {_unfinite(vectors)} are not finite; "
            "expected at least one, and finite numbers"
        )
    kind, _, settings = factory.partition("@")
    fixed = _parameters_in(settings)
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
    size, tunable = faiss.serialize_index(index).nbytes, _tunable_of(index, fixed)
    on_gpu = False
    if device != "cpu" and faiss.get_num_gpus() > 0:
        index, on_gpu = _moved_to_gpu(index)
    built = ApproximateIndex(
        index,
        factory=kind,
        build_seconds=seconds,
        bytes_per_vector=size / len(vectors),
        tunable=tunable,
        on_gpu=on_gpu,
    )
    for name, value in fixed.items():
        built.set_parameter(name, value)
    return built


def _empty_index(kind: str, dim: int) -> faiss.Index:
    try:
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


def _parameters_in(text: str) -> dict[str, int | float]:
    parameters = {}
    for each in text.split(",") if text else ():
        found = re.fullmatch(r"(\w+)=(\d+(?:\.\d+)?)", each.strip())
        if not found:
            raise SearchIndexError(
                f"{each!r} is no search parameter; expected NAME=NUMBER, such as nprobe=8"
            )
        parameters[found[1]] = float(found[2])
    return parameters


def _moved_to_gpu(index: faiss.Index) -> tuple[faiss.Index, bool]:
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index), True
    except RuntimeError:  # not a kind for GPUs, such as HNSW, or no room: it works where it is
        return index, False


def _unfinite(vectors: Float32[np.ndarray, "vectors dim"]) -> int:
    return int((~np.isfinite(vectors).all(axis=1)).sum())


def _reason(error: RuntimeError) -> str:
    """Return the end of a message of FAISS, which begins with a place in its sources."""
    return re.split(r"\.cpp:\d+: |failed: ", " ".join(str(error).split()))[-1]
