"""Verify every shard of a data folder against its manifest, and read every record."""

from dataclasses import dataclass
from pathlib import Path

from vlm.errors import DataError

_NAMED = 10  # an error stays one line that a person can read


@dataclass(frozen=True)
class Options:
    """What `vlm data check` is given."""

    folder: Path
    """Data folder with a manifest."""


def run(options: Options) -> None:
    """Read everything once; print what each split holds."""
    from vlm.data.dataset import ShardedSplit
    from vlm.data.manifest import read_manifest

    for split in read_manifest(options.folder).splits:
        samples = ShardedSplit(options.folder, split)
        if found := list(samples.damaged()):
            more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            raise DataError(
                f"{split}: {len(found)} of {len(samples)} samples cannot be read: "
                + "; ".join(found[:_NAMED]) + more
            )  # fmt: skip
        print(f"{split}: {len(samples)} samples, all readable")
