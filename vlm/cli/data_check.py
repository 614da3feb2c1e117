"""Read every sample of a source and decode its image; verify the shards of a data folder."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vlm.cli.options import SourceOptions, refuse_several_processes
from vlm.errors import DataError

_NAMED = 10  # an error stays one line that a person can read


@dataclass(frozen=True)
class Options(SourceOptions):
    """What `vlm data check` is given."""


def run(options: Options) -> None:
    """Read everything once, all splits of a data folder; print what each split holds."""
    refuse_several_processes("data check")
    from vlm.data.checking import damaged_in, repeated_in
    from vlm.data.manifest import is_data_folder, read_manifest
    from vlm.data.source import open_source

    config, folder = replace(options.source(), verify="each_open"), Path(options.path)
    for split in read_manifest(folder).splits if is_data_folder(folder) else [options.split]:
        source = open_source(replace(config, split=split))
        ...
