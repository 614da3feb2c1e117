"""A run of `vlm eval classification`: what was classified, as the record that is kept of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int

from vlm.evaluation.bootstrap import LEVEL, RESAMPLES, interval_of, resampled_means
from vlm.evaluation.classification.class_names import ClassNames
from vlm.evaluation.classification.dataset import LabelledImages
from vlm.evaluation.classification.metrics import (
    TOP,
    Classification,
    ClassificationScores,
    baselines,
)
from vlm.evaluation.reading import Reading
from vlm.markdown import markdown_table
from vlm.reports.document import score_cell

Interval = tuple[float, float]

_FEWEST_IMAGES = 10
_TIES = "a wrong class with the same score as the right one comes before it"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationRun:
    """What a bundle scored on labelled images, and all that the scores depend on."""

    bundle: str
    """The bundle's folder."""
    source: Mapping[str, Any]
    """Where the images are from: `data` and `where`, of a data folder `split` and `label`."""
    images: LabelledImages
    images_sha256: str
    """Of the images and their labels."""
    classes: ClassNames
    templates: Mapping[str, Sequence[str]]
    """By language."""
    reading: Reading
    """How the model takes in the prompts and the images."""
    scores: Mapping[str, Classification]
    """By language."""
    intervals: Mapping[str, Interval]
    """What `classification_intervals` returns for the scores."""

    @property
    def baselines(self) -> dict[str, ClassificationScores]:
        """Return what is reached without a model."""
        return baselines(np.bincount(self.images.labels, minlength=len(self.classes.ids)))

    def as_record(self) -> dict[str, Any]:
        """Return it as plain dictionaries, for JSON."""
        ids = self.classes.ids
        return {
            "scores": {language: _record(found, ids) for language, found in self.scores.items()},
            "intervals": {"level": LEVEL, "of": dict(self.intervals)},
            "baselines": {name: _numbers(found) for name, found in self.baselines.items()},
            "protocol": {
                **self.source,
                "images": len(self.images.images),
                "left_out": self.images.left_out,
                "classes": len(ids),
                "names": self.classes.names,
                "ties": _TIES,
                "images_sha256": self.images_sha256,
                "templates": self.templates,
                "bundle": self.reading.model,
                "tokenizer": self.reading.tokenizer,
                "context_length": self.reading.context_length,
                "truncated_share": self.reading.truncated_share,
                "dim": self.reading.embed_dim,
                "transform": self.reading.transform,
            },
        }


def classification_intervals(
    scores: Mapping[str, Classification], labels: Int[np.ndarray, " images"]
) -> dict[str, Interval]:
    """Return bootstrap intervals of all scores, `zh/top1` and so on; images are drawn.

    Languages get the same draws. Fewer than ten images have no intervals: of one, every draw is
    the same.

    Args:
        scores: By language, of the same images.
        labels: The number of each image's class.
    """
    if len(labels) < _FEWEST_IMAGES:
        return {}
    counted = {}
    for language, found in scores.items():
        counted[f"{language}/top1"] = found.ranks == 1
        if found.top5 is not None:
            counted[f"{language}/top5"] = found.ranks <= TOP
    values = list(counted.values())
    means = resampled_means(values, [np.arange(len(of_one)) for of_one in values])
    by_class = resampled_class_means(scores, labels)
    return {
        **{name: interval_of(of_one) for name, of_one in zip(counted, means, strict=True)},
        **{
            f"{language}/mean_class_recall": interval_of(of_one)
            for language, of_one in by_class.items()
        },
    }


def resampled_class_means(
    scores: Mapping[str, Classification],
    labels: Int[np.ndarray, " images"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Float64[np.ndarray, " resamples"]]:
    """Return by language the mean over classes of their top-1 for each resample of the images.

    A class of which a resample has no image is left out of its mean.

    Args:
        scores: By language, of the same images; languages get the same draws.
        labels: The number of each image's class.
        resamples: How often to draw.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    classes = int(labels.max()) + 1
    # An image that was not given its class counts to one further class, the last.
    hits = {lang: np.where(found.ranks == 1, labels, classes) for lang, found in scores.items()}
    means = {language: np.empty(resamples) for language in scores}
    for number in range(resamples):
        drawn = rng.integers(len(labels), size=len(labels))
        images = np.bincount(labels[drawn], minlength=classes)
        shown = images > 0
        for language, of_language in hits.items():
            right = np.bincount(of_language[drawn], minlength=classes + 1)[:-1]
            means[language][number] = (right[shown] / images[shown]).mean()
    return means


def classification_rows(
    run: ClassificationRun, *, with_intervals: bool
) -> tuple[list[str], list[list[str]]]:
    """Return a header and a row for each language and each baseline; text in the first column."""
    header = ["names", "top-1", "top-5", "mean per class"]
    rows = []
    for name, found in {**run.scores, **run.baselines}.items():
        around = run.intervals if with_intervals else {}
        cells = [
            "-" if value is None else score_cell(value, around.get(f"{name}/{key}"))
            for key, value in _numbers(found).items()
        ]
        rows.append([name, *cells])
    return header, rows


def format_classification(run: ClassificationRun) -> str:
    """Return how many images there are of how many classes, and a Markdown table of scores."""
    table = markdown_table(*classification_rows(run, with_intervals=False))
    shown, classes = len(np.unique(run.images.labels)), len(run.classes.ids)
    return (
        f"{len(run.images.images)} images of {shown} of {classes} classes; "
        f"{run.images.left_out} left out\n\n{table}"
    )


def _numbers(scores: ClassificationScores) -> dict[str, float | None]:
    return {"top1": scores.top1, "top5": scores.top5, "mean_class_recall": scores.mean_class_recall}


def _record(scores: Classification, ids: Sequence[str]) -> dict[str, Any]:
    recalls = zip(ids, scores.class_recall.tolist(), strict=True)
    return {
        **_numbers(scores),
        "class_recall": {name: None if math.isnan(recall) else recall for name, recall in recalls},
        "confusion": _by_class(scores.confusion, ids),
    }


def _by_class(
    confusion: Int[np.ndarray, "found 3"], ids: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Return the number of images by right class and, in it, by given class."""
    found: dict[str, dict[str, int]] = {}
    for right, given, images in confusion.tolist():
        found.setdefault(ids[right], {})[ids[given]] = images
    return found
