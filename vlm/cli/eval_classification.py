"""Score a bundle on zero-shot classification, with class names and prompts in every language.

Also under `accelerate launch -m vlm eval classification`, which splits the work over processes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.cli.evaluation_runs import (
    add_embedder_arguments,
    add_output_arguments,
    bulk_embedder,
    deliver,
)
from vlm.data.manifest import read_manifest
from vlm.distributed.launched import launched_group
from vlm.embedding.embedder import Embedder
from vlm.errors import ConfigError, DataError
from vlm.evaluation.classification.class_names import ClassNames, read_class_names
from vlm.evaluation.classification.dataset import (
    LabelledImages,
    class_folders,
    images_in_class_folders,
    images_of_split,
)
from vlm.evaluation.classification.evaluation import evaluate_classification
from vlm.evaluation.classification.prompts import prompts_of, read_templates
from vlm.evaluation.reading import Reading, reading_of
from vlm.reports.classification_report import classification_document
from vlm.reports.classification_run import (
    ClassificationRun,
    classification_intervals,
    format_classification,
)

_RECORD_NAME = "classification.json"

_SAMPLES = {"data": Path("data/emoji"), "split": "test_style", "label": "class", "where": []}
"""Which samples of a data folder are scored where options do not say."""


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
        help="label that tells a sample's class; default: class",
    )  # fmt: skip
    parser.add_argument(
        "--where", nargs="+", default=None,
        help="conditions on samples, such as source=noto group!=flags",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=Path | None, default=None,
        help="instead of a data folder, one with a folder of images for each class",
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
    source = _source(options)
    with launched_group(options.device) as group:
        bulk = bulk_embedder(options, group)
        languages = _languages(options, bulk.embedder)
        templates = read_templates(options.templates, languages)
        classes, images = _read_data(options, source, languages)
        digests = bulk.digests_of(images.images)
        scores = evaluate_classification(
            bulk, images.images, images.labels, classes.names, templates, digests=digests
        )
    if group.rank == 0:  # the others need not wait for what one process does
        classified = ClassificationRun(
            bundle=str(options.bundle),
            source=source,
            images=images,
            images_sha256=images.fingerprint(digests),
            classes=classes,
            templates=templates,
            reading=_reading(bulk.embedder, classes, templates),
            scores=scores,
            intervals=classification_intervals(scores, images.labels),
        )
        deliver(
            options,
            classified.as_record(),
            record_name=_RECORD_NAME,
            document=lambda: classification_document(classified),
            table=lambda: format_classification(classified),
        )


def _source(options: Any) -> dict[str, Any]:
    """Return which images are asked for, as the record says it."""
    given = {name: getattr(options, name) for name in _SAMPLES}
    given = {name: value for name, value in given.items() if value is not None}
    if options.images is None:
        source = {**_SAMPLES, **given}
        return {**source, "data": str(source["data"])}
    if given:
        found = " and ".join(f"--{name}" for name in given)
        raise ConfigError(
            f"--images {options.images} is a folder of images by class; found {found}, which "
            f"{'is' if len(given) == 1 else 'are'} for the samples of a data folder; expected none"
        )
    if not options.classes:
        raise ConfigError(f"--images {options.images} needs --classes: the names of its classes")
    return {"data": str(options.images), "where": []}


def _languages(options: Any, embedder: Embedder) -> list[str]:
    languages = list(dict.fromkeys(options.languages or embedder.languages))
    if not languages:
        raise ConfigError(f"{options.bundle} does not tell its languages; name some by --languages")
    return languages


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


def _read_data(
    options: Any, source: Mapping[str, Any], languages: Sequence[str]
) -> tuple[ClassNames, LabelledImages]:
    if options.images is not None:
        folders = class_folders(options.images)
        classes = read_class_names(options.classes, languages, folders=folders)
        return classes, images_in_class_folders(options.images, classes.ids)
    data = Path(source["data"])
    read_manifest(data)  # a folder that is none is said to be so, rather than to lack class names
    own = data / "classes.json"
    if not options.classes and not own.is_file():
        raise DataError(f"{data} has no {own.name}; expected one, or class names by --classes")
    classes = read_class_names(options.classes or [str(own)], languages, label=source["label"])
    images = images_of_split(
        data, source["split"], label=source["label"], class_ids=classes.ids,
        where=source["where"],
    )  # fmt: skip
    return classes, images
