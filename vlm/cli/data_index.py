"""Write the manifest of your own shards, named like train-00000.tar or val-00000.tar.gz."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What `vlm data index` is given."""

    folder: Path
    """Folder with WebDataset shards."""


def run(options: Options) -> None:
    """Write the manifest; print what each split holds."""
    from vlm.data.shards import index_folder

    for split, entries in index_folder(options.folder).splits.items():
        print(f"{split}: {sum(e.samples for e in entries)} samples in {len(entries)} shards")
