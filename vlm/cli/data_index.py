"""Index your own data: a folder of tars in itself, with a manifest; all else in the cache.

The manifest and the indexes of tars at a place can be written to a folder, to be uploaded next to
them: a run then reads the manifest alone before its first step.
"""

from dataclasses import dataclass
from pathlib import Path

from vlm.cli.options import SourceOptions, refuse_several_processes


@dataclass(frozen=True)
class Options(SourceOptions):
    """What `vlm data index` is given."""

    out: Path | None = None
    """Of tars at a place, such as `s3://bucket/folder/*.tar`: the folder for manifest.json and
    index/."""


def run(options: Options) -> None:
    """Index what is not indexed yet; print what each split holds."""
    refuse_several_processes("data index")
    from vlm.data.config import CACHE_GIB
    from vlm.data.copies import node_cache
    from vlm.data.indexing import index_folder
    from vlm.data.layout import tars_in
    from vlm.data.sample import described
    from vlm.data.source import open_source

    path = Path(options.path)
    if options.out:
        manifest = index_folder(options.out, options.source(), node_cache(CACHE_GIB))
    elif path.is_dir() and "" in tars_in(path):
        manifest = index_folder(path, options.source())
    else:
        source = open_source(options.source())
        print(f"{options.split}: {described(source.sizes)}")
        return
    for split, entries in manifest.splits.items():
        print(f"{split}: {described([entry.samples for entry in entries])}")
