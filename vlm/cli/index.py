"""Build a search index from an embeddings folder."""

import sys
from dataclasses import KW_ONLY, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What `vlm index` is given."""

    embeddings: Path
    """Folder that `vlm embed` wrote."""
    _: KW_ONLY
    out: Path
    """New folder for the index."""
    factory: str = "Flat"
    """A FAISS index_factory string such as HNSW32 or IVF256,SQ8 for approximate search, or auto;
    Flat is exact."""


def run(options: Options) -> None:
    """Build the index; print its folder."""
    from vlm.search.search_index import build_search_index

    index = build_search_index(options.embeddings, options.out, factory=options.factory)
    if index.factory != "Flat":
        parameters = " ".join(f"{name}={value:g}" for name, value in index.parameters.items())
        print(f"{index.factory} {parameters}".rstrip(), file=sys.stderr)
    print(options.out)
