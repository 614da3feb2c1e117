"""The options by which evaluation verbs are told which FAISS indexes to put beside exact search."""

from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from vlm.errors import ConfigError
from vlm.evaluation.config import IndexPlan

_DEFAULTS = IndexPlan()


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
        "--target_recall", type=float | None, default=None,
        help="share of the ten nearest neighbours to which search parameters are tuned; "
        f"default: {_DEFAULTS.target_recall}",
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=str | None, default=None,
        help=f"what an index chosen by auto may take; default: {_DEFAULTS.memory}",
    )  # fmt: skip
    parser.add_argument(
        "--sweep", action="store_true",
        help="also measure each index over its search parameter, for --out or --json",
    )  # fmt: skip


def index_plan(options: Any) -> IndexPlan | None:
    """Return what `add_index_arguments` declared; None where no index was named.

    Args:
        options: That and what `add_output_arguments` declared, parsed.

    Raises:
        ConfigError: a number or a size cannot be, or an option would be ignored.
    """
    given = {name: getattr(options, name) for name in ("target_recall", "memory", "sweep")}
    given = {name: value for name, value in given.items() if value not in (None, False)}
    if not options.index:
        if given:
            raise ConfigError(
                f"found {' and '.join(given)} without index; expected --index FACTORY as well"
            )
        return None
    if options.sweep and not (options.out or options.json):
        raise ConfigError("found sweep, which a table does not show; expected --out or --json")
    return IndexPlan(factories=options.index, **given)
