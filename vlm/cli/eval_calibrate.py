"""Fit the map from cosine to match probability on held-out pairs, and store it in the bundle."""

import json
import sys
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.cli.options import JsonOptions, ModelOptions, refuse_several_processes, sources_in
from vlm.cli.parsing import part_of
from vlm.evaluation.config import CalibrationPlan, SourceSettings

if TYPE_CHECKING:
    from vlm.evaluation.calibration import Reliability

_SPLIT = "val"


@dataclass(frozen=True)
class Options(CalibrationPlan, SourceSettings, ModelOptions, JsonOptions):
    """What `vlm eval calibrate` is given."""

    bundle: Path
    """Folder of the bundle to calibrate."""
    _: KW_ONLY
    data: str = "data/emoji"
    """[NAME=]PATH: a data folder, the files of a published benchmark, or another source."""
    split: str | None = None
    """Of a data folder `val` by default, of a benchmark the only one, or `test`, of another source
    `train`."""


def run(options: Options) -> None:
    """Fit, store, and print the threshold and how reliable the map is."""
    refuse_several_processes("eval calibrate")
    from vlm.bundle import store_calibration
    from vlm.embedding.embedder import Embedder
    from vlm.evaluation.calibration import calibrate
    from vlm.evaluation.retrieval.sources import open_source
    from vlm.storage.places import shown

    plan = part_of(options, CalibrationPlan)
    (source,) = sources_in(options, [options.data], folder_split=_SPLIT)
    embedder = Embedder.load(
        options.bundle, device=options.device, truncate_dim=options.truncate_dim
    )
    pairs = open_source(source, languages=embedder.languages)
    if pairs.findings:
        print(f"{source.name}: {'; '.join(pairs.describe_findings())}", file=sys.stderr)
    data = {
        "data": shown(source.path),
        "kind": pairs.kind,
        "split": pairs.split,
        "where": list(source.where or ()),
        "duplicates": pairs.duplicates,
        "cleaning": pairs.cleaning,
    }
    calibration, reliability = calibrate(embedder, pairs, plan, data=data, show_progress_bar=True)
    store_calibration(options.bundle, calibration)
    if options.json:
        checked = {name: asdict(found) for name, found in reliability.items()}
        print(json.dumps({"calibration": calibration.record(), "checked": checked}, indent=1))
        return
    print(
        f"{options.bundle}: threshold {calibration.threshold:.4f} gives precision "
        f"{plan.precision} at a match rate of {plan.prior:.2%}.\n"
        "Checked on the half of the data that it was not fitted on:\n"
    )
    print(_table(reliability))


def _table(reliability: Mapping[str, "Reliability"]) -> str:
    from vlm.markdown import markdown_table

    header = ["texts", "correct pairs", "wrong pairs", "calibration error", "precision", "recall"]
    rows = []
    for name, found in reliability.items():
        ratios = (found.calibration_error, found.precision, found.recall)
        rows.append([name, str(found.correct), str(found.wrong), *(f"{r:.3f}" for r in ratios)])
    return markdown_table(header, rows)
