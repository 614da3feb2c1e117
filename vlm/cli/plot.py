"""Draw training runs, also those that have not ended yet, and compare them."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Options:
    """What `vlm plot` is given."""

    runs: tuple[Path, ...]
    """Folders of runs (`run_folder`)."""
    _: KW_ONLY
    by: Literal["step", "samples"] = "step"
    """What runs along the plots; samples compare runs whose batches differ in size."""
    out: Path | None = None
    """Folder for the page, report.html, and its plots; null is the folder plot in the first run."""


def run(options: Options) -> None:
    """Write the page; print its path."""
    from vlm.errors import ConfigError
    from vlm.reports.document import write_report
    from vlm.reports.training_report import training_document

    if not options.runs:
        raise ConfigError("no run is named; expected `vlm plot RUN [RUN ...]`")
    document = training_document(options.runs, by=options.by)
    print(write_report(options.out or options.runs[0] / "plot", document))
