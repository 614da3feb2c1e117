"""Score a bundle on zero-shot classification, with class names and prompts in every language."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.bulk_embedding import BulkEmbedder
from vlm.classification.class_names import ClassNames, read_class_names
from vlm.classification.dataset import (
    LabelledPictures,
    class_folders,
    pictures_in_class_folders,
    pictures_of_split,
)
from vlm.classification.evaluation import evaluate_classification
from vlm.classification.prompts import prompts_of, read_templates
from vlm.distributed.launched import launched_group
from vlm.embedder import Embedder
from vlm.errors import VlmError
from vlm.files import write_file
from vlm.reports.classification_report import classification_document
from vlm.reports.classification_run import (
    ClassificationRun,
    format_classification,
    intervals_of,
)
from vlm.reports.document import write_report
from vlm.retrieval.pairs import parse_condition
from vlm.retrieval.protocol import Reading, reading_of


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
    parser.add_argument("--device", type=str | None, default=None, help="such as cpu or cuda:0")
    parser.add_argument(
        "--truncate_dim", type=int | None, default=None,
        help="use the first so many numbers of each vector, where they were trained so",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--out", type=Path | None, default=None,
        help="folder for report.html, report.md, classification.json and the plots",
    )  # fmt: skip
    parser.add_argument(
        "--cache", type=Path | None, default=None,
        help="folder to keep vectors in, so that whatever was embedded once is not embedded again; "
        "default: embeddings in the folder --out, if given",
    )  # fmt: skip


def run(options: Any) -> None:
    """Score the bundle; print a table or JSON, and write the report, on the first rank."""
    with launched_group(options.device) as group:
        embedder = Embedder.load(
            options.bundle, device=options.device, truncate_dim=options.truncate_dim
        )
        languages = options.languages or embedder.languages
        templates = read_templates(options.templates, languages)
        classes, pictures = _read_data(options, languages)
        bulk = BulkEmbedder(
            embedder,
            cache=options.cache or (options.out and options.out / "embeddings"),
            group=group,
            show_progress_bar=True,
        )
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
            reading=_reading(embedder, classes, templates),
            scores=scores,
            intervals=intervals_of(scores),
        )
        _report(options, classified)


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


def _report(options: Any, classified: ClassificationRun) -> None:
    text = json.dumps(classified.as_record(), indent=1, ensure_ascii=False)
    if options.out:
        write_file(options.out / "classification.json", (text + "\n").encode())
        page = write_report(options.out, classification_document(classified))
        print(f"report: {page}", file=sys.stderr)
    print(text if options.json else format_classification(classified))


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
