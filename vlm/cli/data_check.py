"""Verify every shard of a data folder against its manifest, and read every record."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.data.dataset import ShardedSplit
from vlm.data.manifest import read_manifest
from vlm.errors import DataError

_NAMED = 10  # an error stays one line that a person can read


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm data check`."""
    parser.add_argument("folder", type=Path, help="data folder with a manifest")


def run(options: Any) -> None:
    """Read everything once; print what each split holds."""
    for split in read_manifest(options.folder).splits:
        samples = ShardedSplit(options.folder, split)
        if found := list(samples.damaged()):
            more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            raise DataError(
                f"{split}: {len(found)} of {len(samples)} samples cannot be read: "
                + "; ".join(found[:_NAMED]) + more
            )  # fmt: skip
        print(f"{split}: {len(samples)} samples, all readable")
