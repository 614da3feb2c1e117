"""Scores of a classification, as pure functions of what was compared."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int, Int64

from vlm.evaluation.bootstrap import RESAMPLES, interval_of, resampled_means

Interval = tuple[float, float]

TOP = 5

SHOWN = 3
"""How many of the highest-scoring classes are kept for each image."""

_FEWEST_IMAGES = 10  # with intervals
_LOWEST = float(np.finfo(np.float32).min)
_TILE = 1 << 22  # scores at a time: 16 MiB


@dataclass(frozen=True, kw_only=True)
class ClassificationScores:
    """How well images were classified."""

    top1: float
    """Fraction of the images whose true class scores highest."""
    top5: float | None
    """Fraction whose true class is among the first five; None if there are fewer classes."""
    mean_class_recall: float
    """Mean of the top-1 of each class that has images."""

    def means(self) -> dict[str, float | None]:
        """Return the scores by name."""
        return {"top1": self.top1, "top5": self.top5, "mean_class_recall": self.mean_class_recall}


@dataclass(frozen=True, kw_only=True)
class Classification(ClassificationScores):
    """The scores of a model, and its predictions."""

    class_recall: Float64[np.ndarray, " classes"]
    """Top-1 of each class's images; NaN for a class without images."""
    confusion: Int64[np.ndarray, "found 3"]
    """Rows (true class, predicted class, images) in order, without pairs that have no image: a
    full matrix would grow with the square of the classes."""
    ranks: Int64[np.ndarray, " images"]
    """Of the true class, 1 the best."""
    best: Int64[np.ndarray, "images shown"]
    """The classes that score highest, best first: `SHOWN`, or all if there are fewer."""
    cosines: Float32[np.ndarray, "images shown"]
    """Of the images with these classes."""


def score_classification(
    images: Float32[np.ndarray, "images dim"],
    classes: Float32[np.ndarray, "classes dim"],
    labels: Int[np.ndarray, " images"],
) -> Classification:
    """Assign every image to the class whose vector has the largest product with its own.

    A wrong class with the same score as the true one ranks before it, so that a model which gives
    all classes the same score is always wrong. Among equal wrong classes the first is predicted.

    Args:
        images: A vector an image; at least one.
        classes: A vector a class; at least one.
        labels: The number of each image's true class.
    """
    shown = min(SHOWN, len(classes))
    ranks = np.empty(len(images), np.int64)
    best = np.empty((len(images), shown), np.int64)
    cosines = np.empty((len(images), shown), np.float32)
    # A matrix product may round equal columns differently: each class takes the products of the
    # first with its vector, so that equal classes tie.
    _, first, which = np.unique(classes, axis=0, return_index=True, return_inverse=True)
    same = first[which]
    rows = max(1, _TILE // len(classes))
    for start in range(0, len(images), rows):
        part = slice(start, start + rows)
        products = (images[part] @ classes.T)[:, same]
        ranks[part], best[part] = _places(products, labels[part], shown)
        cosines[part] = np.take_along_axis(products, best[part], axis=1)
    of_class = np.bincount(labels, minlength=len(classes))
    hits = np.bincount(labels[ranks == 1], minlength=len(classes))
    recall = np.where(of_class > 0, hits / np.maximum(of_class, 1), np.nan)
    pairs, counts = np.unique(np.stack([labels, best[:, 0]], axis=1), axis=0, return_counts=True)
    return Classification(
        top1=float((ranks == 1).mean()),
        top5=float((ranks <= TOP).mean()) if len(classes) >= TOP else None,
        mean_class_recall=float(np.nanmean(recall)),
        class_recall=recall,
        confusion=np.column_stack([pairs, counts]).astype(np.int64),
        ranks=ranks,
        best=best,
        cosines=cosines,
    )


def baselines(images: Int[np.ndarray, " classes"]) -> dict[str, ClassificationScores]:
    """Return the scores of two guesses: classes in random order, and the largest class first.

    Args:
        images: Number of images of each class.
    """
    frequency = images / images.sum()
    count = len(images)
    enough = count >= TOP
    return {
        "random": ClassificationScores(
            top1=1 / count, top5=TOP / count if enough else None, mean_class_recall=1 / count
        ),
        "majority": ClassificationScores(
            top1=float(frequency.max()),
            top5=float(np.sort(frequency)[-TOP:].sum()) if enough else None,
            mean_class_recall=1 / int((images > 0).sum()),
        ),
    }


def classification_intervals(
    scores: Mapping[str, Classification], labels: Int[np.ndarray, " images"]
) -> dict[str, Interval]:
    """Return bootstrap intervals over images of all scores, by `zh/top1` and so on.

    Fewer than ten images have no intervals: every resample of one image is the same.

    Args:
        scores: By language, of the same images; all get the same draws.
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
    intervals = {name: interval_of(of_one) for name, of_one in zip(counted, means, strict=True)}
    for language, of_one in resampled_class_means(scores, labels).items():
        intervals[f"{language}/mean_class_recall"] = interval_of(of_one)
    return intervals


def resampled_class_means(
    scores: Mapping[str, Classification],
    labels: Int[np.ndarray, " images"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Float64[np.ndarray, " resamples"]]:
    """Return by language the mean over classes of their top-1 for each resample of the images.

    A class without an image in a resample is left out of its mean; languages get the same draws.
    """
    rng = np.random.default_rng(seed)
    classes = int(labels.max()) + 1
    # A wrongly classified image counts to an additional last class, which is cut off below.
    hits = {lang: np.where(found.ranks == 1, labels, classes) for lang, found in scores.items()}
    means = {language: np.empty(resamples) for language in scores}
    for number in range(resamples):
        drawn = rng.integers(len(labels), size=len(labels))
        images = np.bincount(labels[drawn], minlength=classes)
        shown = images > 0
        for language, of_language in hits.items():
            correct = np.bincount(of_language[drawn], minlength=classes + 1)[:-1]
            means[language][number] = (correct[shown] / images[shown]).mean()
    return means


def _places(
    products: Float32[np.ndarray, "images classes"], labels: Int[np.ndarray, " images"], shown: int
) -> tuple[Int64[np.ndarray, " images"], Int64[np.ndarray, "images shown"]]:
    """Return the rank of each image's true class, and the classes that come first."""
    scores = np.nan_to_num(products, nan=_LOWEST, neginf=_LOWEST)  # NaN ranks last
    places = np.arange(len(scores))
    true = scores[places, labels]
    scores[places, labels] = -np.inf  # so that it is not counted against itself
    before = (scores >= true[:, None]).sum(axis=1)
    best = np.empty((len(scores), shown), np.int64)
    for place in range(shown):
        highest = scores.argmax(axis=1)
        best[:, place] = np.where(before == place, labels, highest)
        # Where the true class took this place, the highest wrong one stays in the race.
        taken = before != place
        scores[places[taken], highest[taken]] = -np.inf
    return before + 1, best
