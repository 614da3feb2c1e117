"""Build a search index from an embeddings folder."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.search.search_index import build_search_index


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm index`."""
    parser.add_argument("embeddings", type=Path, help="folder that `vlm embed` wrote")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the index")


def run(options: Any) -> None:
    """Build the index; print its folder."""
    build_search_index(options.embeddings, options.out)
    print(options.out)
