"""Index your own data: a folder of tars in itself, with a manifest; all else in the cache."""

from dataclasses import dataclass
from pathlib import Path

from vlm.cli.options import SourceOptions, refuse_several_processes


@dataclass(frozen=True)
class Options(SourceOptions):
    """What `vlm data index` is given."""


def run(options: Options) -> None:
    """Index what is not indexed yet; print what each split holds."""
    refuse_several_processes("data index")
    from vlm.data.indexing import index_folder
    from vlm.data.layout import tars_in
    from vlm.data.source import open_source

    path = Path(options.path)
    if path.is_dir() and "" in tars_in(path):
        for split, entries in index_folder(path, options.source()).splits.items():
            print(f"{split}: {sum(e.samples for e in entries)} samples in {len(entries)} shards")
    else:
        source = open_source(options.source())
        print(f"{options.split}: {len(source)} samples in {len(source.sizes)} shards")
