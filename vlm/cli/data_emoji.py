"""Rebuild the emoji pictures and captions from their pinned packages, the same bytes every time."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.data.emoji.build import build_emoji


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm data emoji`."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path.home() / ".cache/vlm/emoji",
        help="folder for the downloaded packages",
    )


def run(options: Any) -> None:
    """Build the data folder; print it."""
    build_emoji(options.out, cache=options.cache)
    print(options.out)
