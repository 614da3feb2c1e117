"""Tabulate the results of `vlm eval retrieval`, with published scores next to them."""

import json
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from vlm.cli.options import JsonOptions


@dataclass(frozen=True)
class Options(JsonOptions):
    """What `vlm eval table` is given."""

    runs: tuple[Path, ...]
    """Folders that `vlm eval retrieval --out` wrote; may be empty with --published."""
    _: KW_ONLY
    published: str = ""
    """[NAME=]BENCHMARK,...: add published rows of flickr30k-cn, coco-cn, muge, flickr30k or coco,
    by NAME to the runs' benchmark of that name."""
    mixed: bool = False
    """Allow runs with different protocols in one table, marked."""


def run(options: Options) -> None:
    """Print a table for each benchmark and language, or JSON."""
    from vlm.reports.results import read_results
    from vlm.reports.table import as_record, format_tables, tables_of

    published = [name.strip() for name in options.published.split(",") if name.strip()]
    tables = tables_of(read_results(options.runs), published=published, mixed=options.mixed)
    if options.json:
        print(json.dumps(as_record(tables), ensure_ascii=False, indent=1))
    else:
        print(format_tables(tables))
