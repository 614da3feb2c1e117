"""Read every sample of a source and decode its image; verify the shards of a data folder."""

from dataclasses import dataclass, replace

from vlm.cli.options import SourceOptions, refuse_several_processes
from vlm.errors import DataError

_NAMED = 10  # an error stays one line that a person can read


@dataclass(frozen=True)
class Options(SourceOptions):
    """What `vlm data check` is given."""


def run(options: Options) -> None:
    """Read everything once, all splits of a data folder; print what each split holds."""
    refuse_several_processes("data check")
    from vlm.data.layout import splits_of
    from vlm.data.sample import counted
    from vlm.data.source import open_source

    for split in splits_of(options.source()):
        source = open_source(replace(options.source(), split=split), verify="each_open")
        if found := source.damaged():
            more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            raise DataError(
                f"{split}: {len(found)} of {counted(len(source), 'sample')} cannot be read: "
                + "; ".join(found[:_NAMED]) + more
            )  # fmt: skip
        source.check_uids()
        print(f"{split}: {counted(len(source), 'sample')}, all readable")
