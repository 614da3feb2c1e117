"""Tabulate the results of `vlm eval retrieval`, with published scores next to them."""

import json
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.reports.results import read_results
from vlm.reports.table import as_record, format_tables, tables_of


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm eval table`."""
    parser.add_argument(
        "runs", type=Path, nargs="*", default=[], metavar="FOLDER",
        help="runs: folders that `vlm eval retrieval --out` wrote; none for published rows only",
    )  # fmt: skip
    parser.add_argument(
        "--published", type=str, default="", metavar="[NAME=]BENCHMARK,...",
        help="add published rows of flickr30k-cn, coco-cn, muge, flickr30k or coco, by NAME to the "
        "runs' benchmark of that name",
    )  # fmt: skip
    parser.add_argument(
        "--mixed", action="store_true",
        help="allow runs with different protocols in one table, marked",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(options: Any) -> None:
    """Print a table for each benchmark and language, or JSON."""
    published = [name.strip() for name in options.published.split(",") if name.strip()]
    tables = tables_of(read_results(options.runs), published=published, mixed=options.mixed)
    if options.json:
        print(json.dumps(as_record(tables), ensure_ascii=False, indent=1))
    else:
        print(format_tables(tables))
