"""Exact inner-product search over unit vectors with FAISS."""

from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
from jaxtyping import Float32, Int64

from vlm.errors import SearchIndexError


@dataclass(frozen=True, slots=True)
class Hits:
    """What a search found: row `i` belongs to query `i`, best first."""

    scores: Float32[np.ndarray, "queries k"]
    """Cosines in [-1, 1]."""
    ids: Int64[np.ndarray, "queries k"]
    """Positions of the vectors in the index."""


class VectorIndex:
    """Vectors that can be searched; the position of a vector is its id."""

    def __init__(self, index: faiss.Index) -> None:
        self._index = index

    @classmethod
    def build(cls, vectors: Float32[np.ndarray, "vectors dim"]) -> "VectorIndex":
        """Index unit vectors for exact search by cosine."""
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(np.ascontiguousarray(vectors))
        return cls(index)

    @classmethod
    def read(cls, path: Path) -> "VectorIndex":
        """Read what `write` wrote.

        Raises:
            SearchIndexError: the file is missing or not an index.
        """
        try:
            return cls(faiss.read_index(str(path)))
        except RuntimeError as error:
            raise SearchIndexError(f"{path} cannot be read as a FAISS index") from error

    def write(self, path: Path) -> None:
        """Write the index to a file."""
        path.write_bytes(
            faiss.serialize_index(self._index).tobytes()
        )  # faiss hides why a disk refused it

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return int(self._index.d)

    def search(self, queries: Float32[np.ndarray, "queries dim"], k: int) -> Hits:
        """Return the `k` best vectors for each query, or all of them if there are fewer.

        Raises:
            SearchIndexError: the queries have another width, or `k` is less than 1.
        """
        if queries.shape[1] != self.dim or k < 1:
            raise SearchIndexError(
                f"cannot search for the best {k} with queries of width {queries.shape[1]}; "
                f"expected at least 1 and width {self.dim}"
            )
        scores, ids = self._index.search(np.ascontiguousarray(queries), min(k, len(self)))
        return Hits(scores, ids)
