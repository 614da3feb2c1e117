"""Score a bundle on zero-shot classification, with class names and prompts in every language."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.classification.class_names import ClassNames, read_class_names
from vlm.classification.dataset import (
    LabelledPictures,
    class_folders,
    pictures_in_class_folders,
    pictures_of_split,
)
from vlm.classification.evaluation import evaluate_classification
from vlm.classification.prompts import prompts_of, read_templates
from vlm.cli.evaluation_runs import (
    add_embedder_arguments,
    add_output_arguments,
    bulk_embedder,
    deliver,
)
from vlm.distributed.launched import launched_group
from vlm.embedder import Embedder
from vlm.errors import VlmError
from vlm.reports.classification_report import classification_document
from vlm.reports.classification_run import (
    ClassificationRun,
    format_classification,
    intervals_of,
)
from vlm.retrieval.pairs import parse_condition
from vlm.retrieval.protocol import Reading, reading_of

_RECORD_NAME = "classification.json"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm eval classification`."""
    parser.add_argument("bundle", type=Path, help="folder of the bundle to score")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="data folder")
    parser.add_argument("--split", type=str, default="test_style", help="split to score")
    parser.add_argument(
        "--label", type=str, default="class", help="label that tells a sample's class"
    )
    parser.add_argument(
        "--where", nargs="+", default=[],
        help="conditions on samples, such as source=noto group!=flags",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=Path | None, default=None,
        help="instead of a data folder, one with a folder of pictures for each class",
    )  # fmt: skip
    parser.add_argument(
        "--classes", nargs="+", default=[],
        help="class names: a JSON or YAML file by class, or a text file with one a line in the "
        "order of the sorted folders; LANGUAGE=FILE for each language; default: the data folder's "
        "classes.json",
    )  # fmt: skip
    parser.add_argument(
        "--templates", type=str, default="general",
        help="prompts: general, drawings, name, or a YAML or JSON file with lists by language",
    )  # fmt: skip
    parser.add_argument(
        "--languages", nargs="+", default=None, help="languages to ask in; default: the bundle's"
    )
    add_embedder_arguments(parser)
    add_output_arguments(parser, record_name=_RECORD_NAME)


def run(options: Any) -> None:
    """Score the bundle; print a table or JSON, and write the report, on the first rank."""
    with launched_group(options.device) as group:
        bulk = bulk_embedder(options, group)
        languages = options.languages or bulk.embedder.languages
        templates = read_templates(options.templates, languages)
        classes, pictures = _read_data(options, languages)
        digests = bulk.digests_of(pictures.images)
        scores = evaluate_classification(
            bulk, pictures.images, pictures.labels, classes.names, templates, digests=digests
        )
    if group.rank == 0:  # the others need not wait for what one process does
        classified = ClassificationRun(
            bundle=str(options.bundle),
            source=_source(options),
            pictures=pictures,
            pictures_sha256=pictures.fingerprint(digests),
            classes=classes,
            templates=templates,
            reading=_reading(bulk.embedder, classes, templates),
            scores=scores,
            intervals=intervals_of(scores),
        )
        deliver(
            options,
            classified.as_record(),
            record_name=_RECORD_NAME,
            document=lambda: classification_document(classified),
            table=lambda: format_classification(classified),
        )


def _source(options: Any) -> dict[str, Any]:
    if options.images:
        return {"data": str(options.images), "where": []}
    return {
        "data": str(options.data),
        "split": options.split,
        "label": options.label,
        "where": list(options.where),
    }


def _reading(
    embedder: Embedder, classes: ClassNames, templates: Mapping[str, Sequence[str]]
) -> Reading:
    prompts = (
        prompt
        for language, names in classes.names.items()
        for of_class in names
        for prompt in prompts_of(of_class, templates[language])
    )
    return reading_of(embedder, list(dict.fromkeys(prompts)))


def _read_data(options: Any, languages: Sequence[str]) -> tuple[ClassNames, LabelledPictures]:
    if options.images is None:
        sources = options.classes or [str(options.data / "classes.json")]
        classes = read_class_names(sources, languages, label=options.label)
        pictures = pictures_of_split(
            options.data, options.split, label=options.label, class_ids=classes.ids,
            conditions=[parse_condition(text) for text in options.where],
        )  # fmt: skip
        return classes, pictures
    if options.where:
        raise VlmError("--where is for the samples of --data; pictures in folders have no labels")
    folders = class_folders(options.images)
    if not options.classes:
        raise VlmError(f"--images {options.images} needs --classes: the names of its classes")
    classes = read_class_names(options.classes, languages, folders=folders)
    return classes, pictures_in_class_folders(options.images, classes.ids)
