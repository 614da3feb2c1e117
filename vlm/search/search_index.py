"""Search indexes on disk: built from embeddings, searched by vectors, tied to their model."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Float32

from vlm.bundle import is_bundle
from vlm.embedding.embedder import Embedder
from vlm.embedding.parts import read_embeddings
from vlm.errors import DataError, SearchIndexError
from vlm.files import sha256_of, write_folder
from vlm.search.index import AUTO, ROUNDING, VectorIndex, choose_factory, cosines_of

_INDEX, _METADATA, _DESCRIPTION = "image.index", "metadata.parquet", "index.json"
_TARGET_RECALL, _TUNING_QUERIES = 0.95, 1000
_NEIGHBOURS = 11  # a vector finds itself, and ten others


@dataclass(frozen=True, slots=True)
class Hit:
    """One image that a search found."""

    rank: int
    """Counted from 1."""
    score: float
    """Cosine in [-1, 1]."""
    uid: str
    path: str
    """The image's file, or FOLDER/SHARD#ROW."""
    captions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchIndex:
    """An index folder, opened."""

    index: VectorIndex
    metadata: pyarrow.Table
    """One row a vector."""
    bundle: Path
    """Folder of the model that made the vectors."""
    fingerprint: str
    """That model's fingerprint."""

    def __post_init__(self) -> None:
        if len(self.index) != self.metadata.num_rows:
            raise SearchIndexError(
                f"the index holds {len(self.index)} vectors and {self.metadata.num_rows} rows of "
                "metadata"
            )

    @classmethod
    def open(cls, folder: Path) -> "SearchIndex":
        """Open what `build_search_index` wrote, if none of its files is damaged."""
        path = folder / _DESCRIPTION
        if not path.is_file():
            raise SearchIndexError(f"{folder} is not a search index: it has no {_DESCRIPTION}")
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            for name in (_INDEX, _METADATA):
                found, expected = sha256_of(folder / name), str(description["sha256"][name])
                if found != expected:
                    raise SearchIndexError(
                        f"{folder / name} is damaged: sha256 {found[:12]}, expected {expected[:12]}"
                    )
            # Not by `read_table`, which imports pyarrow's datasets.
            with pyarrow.parquet.ParquetFile(folder / _METADATA) as file:
                metadata = file.read()
            return cls(
                index=VectorIndex.read(folder / _INDEX),
                metadata=metadata,
                bundle=folder / str(description["bundle"]),
                fingerprint=str(description["fingerprint"]),
            )
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise SearchIndexError(f"the index {folder} cannot be read: {error}") from error

    def load_embedder(self, bundle: Path | None = None, *, device: str | None = None) -> Embedder:
        """Load the model that made the index, at the width of its vectors.

        `bundle` is the model's folder, if it is not where it was; `device` as for `Embedder.load`.
        """
        if bundle is None and not is_bundle(self.bundle):
            raise SearchIndexError(
                f"the index was made with the model in {self.bundle}, which is not there; expected "
                "its folder as --bundle"
            )
        embedder = Embedder.load(bundle or self.bundle, device=device)
        if embedder.fingerprint != self.fingerprint:
            raise SearchIndexError(
                f"the index was made by another model ({self.fingerprint[:12]}) than the one "
                f"given ({embedder.fingerprint[:12]})"
            )
        return embedder.truncated(self.index.dim)

    def search(self, query: Float32[np.ndarray, "1 dim"], k: int) -> list[Hit]:
        """Return the `k` images nearest to one vector; an approximate index may find fewer."""
        hits = self.index.search(query, k)
        # Not by `take`, which imports half a second of pyarrow's other functions.
        ids = hits.ids[0].tolist()
        rows = [self.metadata.slice(id_, 1).to_pylist()[0] for id_ in ids if id_ >= 0]
        return [
            Hit(
                rank=rank,
                score=float(score),
                uid=row["uid"],
                path=row["image_path"],
                captions={
                    name.removeprefix("caption_"): text
                    for name, text in row.items()
                    if name.startswith("caption_") and text
                },
            )
            # Where an approximate index found fewer, the ids -1 stand at the end.
            for rank, (score, row) in enumerate(zip(hits.scores[0], rows, strict=False), start=1)
        ]


def build_search_index(embeddings: Path, out: Path, *, factory: str = "Flat") -> VectorIndex:
    """Index an embeddings folder into `out`, which must not exist.

    The search parameter of an approximate index is tuned so that images find 95 % of their ten
    nearest; texts, which lie farther away, find fewer (`vlm eval index` measures it).

    Args:
        embeddings: The folder that `vlm embed` wrote.
        out: Where to.
        factory: As for `VectorIndex.build`, or `auto` for what `choose_factory` names.

    Raises:
        SearchIndexError: the embeddings cannot be read, or the index cannot be built of them.
        DataError: `out` exists.
    """
    if out.exists():
        raise DataError(f"{out} exists already; choose another folder for the index")
    description, vectors, metadata = read_embeddings(embeddings)
    if factory == AUTO:
        factory = choose_factory(*vectors.shape)
    index = VectorIndex.build(vectors, factory)
    index.tune(lambda: _recall(index, vectors), target=_TARGET_RECALL)
    with write_folder(out) as temporary:
        index.write(temporary / _INDEX)
        pyarrow.parquet.write_table(metadata, temporary / _METADATA)
        record = {
            # Relative, so that a run can be moved as a whole.
            "bundle": os.path.relpath(description.bundle, out.resolve()),
            "fingerprint": description.fingerprint,
            "sha256": {name: sha256_of(temporary / name) for name in (_INDEX, _METADATA)},
        }
        (temporary / _DESCRIPTION).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return index


def _recall(index: VectorIndex, vectors: Float32[np.ndarray, "vectors dim"]) -> float:
    """Return how many of the ten nearest of a sample of the vectors an index finds."""
    queries = vectors[:: -(-len(vectors) // _TUNING_QUERIES)]
    nearest = VectorIndex.build(vectors).search(queries, _NEIGHBOURS).scores
    found = cosines_of(index.search(queries, _NEIGHBOURS).ids, queries, vectors)
    return float((found >= nearest[:, -1:] - ROUNDING).mean())
