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
    from vlm.records.texts import listed

    for split in splits_of(options.source()):
        source = open_source(replace(options.source(), split=split), verify="each_open")
        if found := source.damaged():
            number, reasons = sum(number for number, _ in found), [reason for _, reason in found]
            raise DataError(
                f"{split}: {number:,} of {counted(len(source), 'sample')} cannot be read: "
                f"{listed(reasons, _NAMED, '; ')}"
            )
        source.check_uids()
        print(f"{split}: {counted(len(source), 'sample')}, all readable")
