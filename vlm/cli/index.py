"""Build a search index from an embeddings folder."""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.search.search_index import build_search_index


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm index`."""
    parser.add_argument("embeddings", type=Path, help="folder that `vlm embed` wrote")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the index")
    parser.add_argument(
        "--factory", type=str, default="Flat",
        help="a FAISS index_factory string such as HNSW32 or IVF256,SQ8 for approximate search, "
        "or auto; default: Flat, which is exact",
    )  # fmt: skip


def run(options: Any) -> None:
    """Build the index; print its folder."""
    index = build_search_index(options.embeddings, options.out, factory=options.factory)
    if index.factory != "Flat":
        parameters = " ".join(f"{name}={value:g}" for name, value in index.parameters.items())
        print(f"{index.factory} {parameters}".rstrip(), file=sys.stderr)
    print(options.out)
