"""Score a bundle on zero-shot classification, with class names and prompts in every language."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.classification.class_names import ClassNames, read_class_names
from vlm.classification.confusion_plot import confusion_png
from vlm.classification.dataset import (
    LabelledPictures,
    class_folders,
    pictures_in_class_folders,
    pictures_of_split,
)
from vlm.classification.evaluation import evaluate_classification
from vlm.classification.metrics import ClassificationScores, baselines
from vlm.classification.prompts import read_templates
from vlm.embedder import Embedder
from vlm.errors import VlmError
from vlm.files import write_file
from vlm.markdown import markdown_table
from vlm.retrieval.pairs import parse_condition

_TIES = "a wrong class with the same score as the right one comes before it"


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
        help="folder for classification.json and a plot of each language's confusion",
    )  # fmt: skip


def run(options: Any) -> None:
    """Score the bundle; print a table or JSON, and write the plots."""
    embedder = Embedder.load(
        options.bundle, device=options.device, truncate_dim=options.truncate_dim
    )
    languages = options.languages or embedder.languages
    templates = read_templates(options.templates, languages)
    classes, pictures = _read_data(options, languages)
    scores = evaluate_classification(
        embedder, pictures.images, pictures.labels, classes.names, templates,
        show_progress_bar=True,
    )  # fmt: skip
    guesses = baselines(next(iter(scores.values())).confusion.sum(axis=1))
    record = {
        "scores": {language: _record(found, classes.ids) for language, found in scores.items()},
        "baselines": {name: _numbers(found) for name, found in guesses.items()},
        "protocol": {
            "data": str(options.images or options.data),
            **({} if options.images else {"split": options.split, "label": options.label}),
            "where": list(options.where),
            "pictures": len(pictures.images),
            "left_out": pictures.left_out,
            "pictures_sha256": pictures.fingerprint(),
            "classes": len(classes.ids),
            "names": classes.names,
            "templates": templates,
            "ties": _TIES,
            "bundle": embedder.fingerprint,
            "tokenizer": embedder.tokenizer.fingerprint,
            "context_length": embedder.tokenizer.context_length,
            "truncated_share": embedder.tokenizer.truncated_share,
            "dim": embedder.embed_dim,
        },
    }
    text = json.dumps(record, indent=1, ensure_ascii=False)
    if options.out:
        write_file(options.out / "classification.json", (text + "\n").encode())
        _write_plots(options.out, scores, classes)
    print(text if options.json else _table(scores, guesses, pictures))


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


def _numbers(scores: ClassificationScores) -> dict[str, float | None]:
    return {"top1": scores.top1, "top5": scores.top5, "mean_class_recall": scores.mean_class_recall}


def _record(scores: ClassificationScores, ids: Sequence[str]) -> dict[str, Any]:
    recalls = zip(ids, scores.class_recall.tolist(), strict=True)
    return {
        **_numbers(scores),
        "class_recall": {name: None if math.isnan(recall) else recall for name, recall in recalls},
        "confusion": scores.confusion.tolist(),
    }


def _table(
    scores: Mapping[str, ClassificationScores],
    guesses: Mapping[str, ClassificationScores],
    pictures: LabelledPictures,
) -> str:
    rows = []
    for name, found in [*scores.items(), *guesses.items()]:
        numbers = ["-" if value is None else f"{value:.3f}" for value in _numbers(found).values()]
        rows.append([name, *numbers])
    counts = next(iter(scores.values())).confusion.sum(axis=1)
    header = ["names", "top-1", "top-5", "mean per class"]
    return (
        f"{len(pictures.images)} pictures of {int((counts > 0).sum())} of {len(counts)} classes; "
        f"{pictures.left_out} left out\n\n{markdown_table(header, rows)}"
    )


def _write_plots(
    folder: Path, scores: Mapping[str, ClassificationScores], classes: ClassNames
) -> None:
    english = classes.names.get("en")
    names = [of_class[0] for of_class in english] if english else classes.ids
    for language, found in scores.items():
        title = f"class names in {language!r}: top-1 {found.top1:.3f}"
        png = confusion_png(found.confusion, names, title=title)
        write_file(folder / f"confusion_{language}.png", png)
