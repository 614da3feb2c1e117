"""Fit the map from cosine to match probability on held-out pairs, and store it in the bundle."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.bundle import store_calibration
from vlm.cli.evaluation_sources import add_source_arguments, sources
from vlm.cli.processes import refuse_several_processes
from vlm.embedding.embedder import Embedder
from vlm.evaluation.calibration import Reliability, calibrate
from vlm.evaluation.config import CalibrationPlan
from vlm.evaluation.retrieval.sources import open_source
from vlm.markdown import markdown_table

_SPLIT = "val"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm eval calibrate`."""
    parser.add_argument("bundle", type=Path, help="folder of the bundle to calibrate")
    add_source_arguments(parser, many=False, folder_split=_SPLIT)
    parser.add_class_arguments(CalibrationPlan)
    parser.add_argument("--device", type=str | None, default=None, help="such as cpu or cuda:0")
    parser.add_argument(
        "--truncate_dim", type=int | None, default=None,
        help="keep only the first N dimensions (a Matryoshka width of the model)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: Any) -> None:
    """Fit, store, and print the threshold and how reliable the map is."""
    refuse_several_processes("eval calibrate")
    plan = CalibrationPlan(
        **{name: getattr(options, name) for name in CalibrationPlan.__dataclass_fields__}
    )
    (source,) = sources(options, folder_split=_SPLIT)
    embedder = Embedder.load(
        options.bundle, device=options.device, truncate_dim=options.truncate_dim
    )
    pairs = open_source(source, languages=embedder.languages)
    if pairs.findings:
        print(f"{source.name}: {dict(pairs.findings)}", file=sys.stderr)
    data = {
        "data": str(source.path),
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


def _table(reliability: Mapping[str, Reliability]) -> str:
    header = ["texts", "correct pairs", "wrong pairs", "calibration error", "precision", "recall"]
    rows = []
    for name, found in reliability.items():
        ratios = (found.calibration_error, found.precision, found.recall)
        rows.append([name, str(found.correct), str(found.wrong), *(f"{r:.3f}" for r in ratios)])
    return markdown_table(header, rows)
