"""Score a bundle on zero-shot classification, with class names and prompts in every language.

Also under `accelerate launch -m vlm eval classification`, which splits the work over processes.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.cli.evaluation_runs import (
    add_embedder_arguments,
    add_output_arguments,
    bulk_embedder,
    deliver,
)
from vlm.distributed.launched import launched_group
from vlm.evaluation.classification.run import evaluate
from vlm.evaluation.config import ClassificationSource
from vlm.reports.classification_report import classification_document, format_classification

_RECORD_NAME = "classification.json"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm eval classification`."""
    parser.add_argument("bundle", type=Path, help="folder of the bundle to score")
    parser.add_argument(
        "--data", type=Path | None, default=None, help="data folder; default: data/emoji"
    )
    parser.add_argument(
        "--split", type=str | None, default=None, help="split to score; default: test_style"
    )
    parser.add_argument(
        "--label", type=str | None, default=None,
        help="label that names a sample's class; default: class",
    )  # fmt: skip
    parser.add_argument(
        "--where", nargs="+", default=None,
        help="conditions on samples, such as source=noto group!=flags",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=Path | None, default=None,
        help="folder with a folder of images for each class (instead of --data)",
    )  # fmt: skip
    parser.add_argument(
        "--classes", nargs="+", default=[],
        help="class names: a JSON or YAML file by class, or a text file with one name per line in "
        "the order of the sorted folders; LANGUAGE=FILE for each language; default: classes.json "
        "in the data folder",
    )  # fmt: skip
    parser.add_argument(
        "--templates", type=str, default="general",
        help="prompts: general, drawings, name, or a YAML or JSON file with lists by language",
    )  # fmt: skip
    parser.add_argument(
        "--languages",
        nargs="+",
        default=None,
        help="languages of the class names; default: the bundle's",
    )
    add_embedder_arguments(parser)
    add_output_arguments(parser, record_name=_RECORD_NAME)


def run(options: Any) -> None:
    """Score the bundle; print a table or JSON, and write the report, on the first rank."""
    source = ClassificationSource(
        **{field.name: getattr(options, field.name) for field in fields(ClassificationSource)}
    )
    with launched_group(options.device) as group:
        found = evaluate(bulk_embedder(options, group), source, bundle=str(options.bundle))
    if group.rank == 0:
        deliver(
            options,
            found.as_record(),
            record_name=_RECORD_NAME,
            document=lambda: classification_document(found),
            table=lambda: format_classification(found),
        )
