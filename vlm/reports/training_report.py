"""A page on training runs: how they went, drawn over their steps, and how their settings differ."""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlm.errors import ConfigError, DataError
from vlm.reports.document import Block, Document, Figure, Paragraph, Section, Table, without_code
from vlm.reports.training_plots import PLOTS, Axis, Records, plot_png
from vlm.training.config import flat_settings
from vlm.training.monitoring.reporter import METRICS_NAME, read_records
from vlm.training.saving.resuming import CONFIG_NAME

_OF_NO_INTEREST = ("run_folder",)


def read_runs(folders: Sequence[Path]) -> dict[str, Records]:
    """Read what runs have recorded so far, by the shortest ends of their paths that differ.

    Raises:
        ConfigError: a run is given twice.
        DataError: a folder holds no run, or one that has recorded nothing yet.
    """
    names = _names_of(folders)
    runs: dict[str, Records] = {}
    for name, folder in zip(names, folders, strict=True):
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; expected the run_folder of `vlm train`")
        runs[name] = read_records(folder / METRICS_NAME)
        if not runs[name]:
            raise DataError(
                f"{folder / METRICS_NAME} holds no record; expected those that `vlm train` writes "
                "every report_every steps"
            )
    return runs


def training_document(folders: Sequence[Path], *, by: Axis = "step") -> Document:
    """Return the comparison of runs, or the record of one.

    Args:
        folders: Their run folders; a run that has not ended is drawn as far as it has come.
        by: What runs along the plots: steps, or samples where batches have several sizes.

    Raises:
        ConfigError: a run is given twice.
        DataError: a folder holds no run, one that has recorded nothing, or no number of samples.
    """
    runs = read_runs(folders)
    for name, records in runs.items():
        if by == "samples" and any(by not in record for record in records):
            raise DataError(
                f"the records of {name} have no number of samples, as an older version wrote them; "
                "expected --by step"
            )
    figures: list[tuple[str, list[Block]]] = []
    for plot in PLOTS:
        png = plot_png(plot, runs, by=by)
        if png:
            alt = f"{plot.name} of {', '.join(runs)} by {by}"
            name = f"{plot.name.lower()}.png"
            figures.append((plot.name, [Figure(name=name, content=png, alt=alt)]))
    sections = [Section(title=title, blocks=blocks) for title, blocks in figures]
    if len(runs) > 1:
        sections.append(Section(title="Settings that differ", blocks=[_differences(runs, folders)]))
    title = "Training runs" if len(runs) > 1 else f"Training run {without_code(next(iter(runs)))}"
    return Document(title=title, summary=[_overview(runs)], sections=sections)


def _names_of(folders: Sequence[Path]) -> list[str]:
    paths = [folder.resolve() for folder in folders]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise ConfigError(f"the run {twice} is given twice; expected each once")
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return ["/".join(path.parts[-length:]) for path in paths]


def _overview(runs: Mapping[str, Records]) -> Table:
    """Return a row a run: how far it has come, what it scored last, and how quick it was."""
    recalls = sorted({
        name for records in runs.values() for record in records for name in record
        if re.fullmatch(r".+/mean_recall", name)
    })  # fmt: skip
    rows = []
    for run, records in runs.items():
        speed = [record["samples_per_s"] for record in records if record.get("samples_per_s")]
        rows.append([
            without_code(run),
            f"{records[-1]['step']:,}",
            _last(records, "loss", ".3f"),
            *(_last(records, name, ".3f") for name in recalls),
            f"{statistics.median(speed):,.0f}" if speed else "",
            _last(records, "skipped_samples", ",.0f"),
        ])  # fmt: skip
    return Table(
        header=["run", "steps", "loss", *recalls, "samples/s, median", "skipped samples"],
        rows=rows,
        caption="Last values of each run.",
    )


def _last(records: Records, name: str, form: str) -> str:
    found = [record[name] for record in records if record.get(name) is not None]
    return format(found[-1], form) if found else ""


def _differences(runs: Mapping[str, Records], folders: Sequence[Path]) -> Table | Paragraph:
    settings = [_settings(folder / CONFIG_NAME) for folder in folders]
    names = dict.fromkeys(name for each in settings for name in each)
    rows = []
    for name in names:
        values = [without_code(str(each.get(name, ""))) for each in settings]
        if len(set(values)) > 1 and name not in _OF_NO_INTEREST:
            rows.append([f"`{name}`", *values])
    if not rows:
        return Paragraph("The runs have the same settings.")
    header = ["setting", *map(without_code, runs)]
    return Table(header=header, rows=rows, text_columns=len(header))


def _settings(path: Path) -> dict[str, Any]:
    try:
        return flat_settings(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
