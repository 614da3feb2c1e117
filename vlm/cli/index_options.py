"""The options by which evaluation verbs are told which FAISS indexes to put beside exact search."""

from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from vlm.retrieval.index_comparison import IndexPlan


def add_index_arguments(parser: ArgumentParser, *, default: Sequence[str] = ()) -> None:
    """Declare the indexes, and how they are tuned and measured.

    Args:
        parser: Gets the options.
        default: The indexes where none is named.
    """
    parser.add_argument(
        "--index", nargs="+", default=list(default), metavar="FACTORY",
        help="FAISS indexes to put beside exact search: strings for index_factory such as HNSW32 "
        "or IVF64,SQ8, with @nprobe=8 where a parameter is not to be tuned; auto is chosen by "
        "size, memory and recall",
    )  # fmt: skip
    parser.add_argument(
        "--target_recall", type=float, default=0.95,
        help="share of the ten nearest neighbours to which search parameters are tuned",
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=str, default="1GiB", help="what an index chosen by auto may take"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="also measure each index over its search parameter"
    )


def index_plan(options: Any) -> IndexPlan | None:
    """Return what `add_index_arguments` declared; None where no index was named.

    Raises:
        ConfigError: a number or a size cannot be.
    """
    if not options.index:
        return None
    return IndexPlan(
        factories=options.index,
        target_recall=options.target_recall,
        memory=options.memory,
        sweep=options.sweep,
    )
