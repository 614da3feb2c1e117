"""What evaluation verbs share: the model that they embed with, and how they say what they found."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.distributed.groups import RankGroup
from vlm.embedding.bulk import BulkEmbedder
from vlm.embedding.embedder import Embedder
from vlm.errors import ConfigError
from vlm.files import write_file
from vlm.reports.document import Document, write_report


def add_embedder_arguments(parser: ArgumentParser) -> None:
    """Declare where and at which width the bundle's model runs, and where vectors are kept."""
    parser.add_argument("--device", type=str | None, default=None, help="such as cpu or cuda:0")
    parser.add_argument(
        "--truncate_dim", type=int | None, default=None,
        help="use the first so many numbers of each vector, where they were trained so",
    )  # fmt: skip
    parser.add_argument(
        "--cache", type=Path | None, default=None,
        help="folder that keeps embeddings, so that an interrupted run goes on where it was; "
        "default: cache in the folder of --out",
    )  # fmt: skip


def bulk_embedder(options: Any, group: RankGroup) -> BulkEmbedder:
    """Load the bundle, to embed with the ranks of a group.

    Raises:
        ConfigError: something else than a folder is where `--out` or `--cache` says.
        CheckpointError: the folder is not a bundle, or it is damaged.
        VlmError: there is no such device, or the features were not trained at that width.
    """
    check_folders(options)
    return BulkEmbedder(
        Embedder.load(options.bundle, device=options.device, truncate_dim=options.truncate_dim),
        cache=options.cache or (options.out and options.out / "cache"),
        group=group,
        show_progress_bar=True,
    )


def add_output_arguments(parser: ArgumentParser, *, record_name: str) -> None:
    """Declare where results go.

    Args:
        parser: Gets the options.
        record_name: The file in the folder of `--out` that has the JSON.
    """
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--out", type=Path | None, default=None,
        help=f"folder for report.html, report.md with its images, and {record_name}",
    )  # fmt: skip


def check_folders(options: Any) -> None:
    """Refuse an `--out` or a `--cache` that cannot be a folder, before any work is done for it.

    Args:
        options: What was declared here, parsed; a verb need not have both.

    Raises:
        ConfigError: something else than a folder is there, or on the way there.
    """
    for name in ("out", "cache"):
        folder: Path | None = getattr(options, name, None)
        if folder is None:
            continue
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not there.is_dir():
            raise ConfigError(
                f"--{name} is {folder}, but {there} is no folder; expected a folder or a new name"
            )


def deliver(
    options: Any,
    record: Mapping[str, Any],
    *,
    record_name: str,
    document: Callable[[], Document],
    table: Callable[[], str],
) -> None:
    """Write the JSON and the report where `--out` says, and print the table or the JSON.

    Args:
        options: What `add_output_arguments` declared, parsed.
        record: What was found.
        record_name: As there.
        document: Gives the report, if it is asked for.
        table: Gives what is printed, if JSON is not asked for.

    Raises:
        VlmError: something cannot be written.
    """
    check_folders(options)
    text = json.dumps(record, indent=1, ensure_ascii=False)
    if options.out:
        write_file(options.out / record_name, (text + "\n").encode())
        print(f"report: {write_report(options.out, document())}", file=sys.stderr)
    print(text if options.json else table())
