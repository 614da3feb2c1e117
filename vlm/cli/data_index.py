"""Write the manifest of your own shards, named like train-00000.tar or val-00000.tar.gz."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.data.shards import index_folder


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm data index`."""
    parser.add_argument("folder", type=Path, help="folder with WebDataset shards")


def run(options: Any) -> None:
    """Write the manifest; print what each split holds."""
    for split, entries in index_folder(options.folder).splits.items():
        print(f"{split}: {sum(e.samples for e in entries)} samples in {len(entries)} shards")
