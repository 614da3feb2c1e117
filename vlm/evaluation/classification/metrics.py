"""Scores of a classification, as pure functions of what was compared."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, Int64

TOP = 5

SHOWN = 3
"""How many of the classes that score highest are told of each image."""

_LOWEST = float(np.finfo(np.float32).min)
_TILE = 1 << 22  # scores that are looked at together: 16 MiB of them


@dataclass(frozen=True, kw_only=True)
class ClassificationScores:
    """How well images were told apart."""

    top1: float
    """Share in [0, 1] of the images whose right class scores highest."""
    top5: float | None
    """Share whose right class is among the first five; None where there are fewer classes."""
    mean_class_recall: float
    """Mean over the classes with images of the share of theirs that were given their class."""


@dataclass(frozen=True, kw_only=True)
class Classification(ClassificationScores):
    """The scores of a model, and what it said of each image."""

    class_recall: Float64[np.ndarray, " classes"]
    """The share of each class's images that were given their class; nan where it has none."""
    confusion: Int64[np.ndarray, "found 3"]
    """Rows (right class, given class, images), in their order and without those of no image: a
    matrix of all classes would grow with their square."""
    ranks: Int64[np.ndarray, " images"]
    """Of the right class among all, 1 the best; by it `top1` and `top5` are counted."""
    best: Int64[np.ndarray, "images shown"]
    """The classes that score highest, best first: `SHOWN`, or all where there are fewer."""
    cosines: Float32[np.ndarray, "images shown"]
    """Of the images with these classes."""


def score_classification(
    images: Float32[np.ndarray, "images dim"],
    classes: Float32[np.ndarray, "classes dim"],
    labels: Int[np.ndarray, " images"],
) -> Classification:
    """Give every image the class whose vector has the largest product with its own.

    A wrong class with the same score as the right one comes before it, so that a model which gives
    all classes the same score is always wrong. Among equal wrong classes the first is given.

    Args:
        images: A vector an image; at least one.
        classes: A vector a class; at least one.
        labels: The number of each image's right class.
    """
    shown = min(SHOWN, len(classes))
    ranks = np.empty(len(images), np.int64)
    best = np.empty((len(images), shown), np.int64)
    cosines = np.empty((len(images), shown), np.float32)
    rows = max(1, _TILE // len(classes))
    for start in range(0, len(images), rows):
        part = slice(start, start + rows)
        products = images[part] @ classes.T
        ranks[part], best[part] = _places(products, labels[part], shown)
        cosines[part] = np.take_along_axis(products, best[part], axis=1)
    recall = _recall_by_class(ranks == 1, labels, len(classes))
    return Classification(
        top1=float((ranks == 1).mean()),
        top5=float((ranks <= TOP).mean()) if len(classes) >= TOP else None,
        mean_class_recall=float(np.nanmean(recall)),
        class_recall=recall,
        confusion=_confusion(labels, best[:, 0]),
        ranks=ranks,
        best=best,
        cosines=cosines,
    )


def baselines(images: Int[np.ndarray, " classes"]) -> dict[str, ClassificationScores]:
    """Return what no model is needed for: a random order of the classes, and the largest first.

    Args:
        images: Number of images of each class.
    """
    share = images / images.sum()
    count = len(images)
    enough = count >= TOP
    return {
        "random": ClassificationScores(
            top1=1 / count,
            top5=TOP / count if enough else None,
            mean_class_recall=1 / count,
        ),
        "majority": ClassificationScores(
            top1=float(share.max()),
            top5=float(np.sort(share)[-TOP:].sum()) if enough else None,
            mean_class_recall=1 / int((images > 0).sum()),
        ),
    }


def _recall_by_class(
    right: Bool[np.ndarray, " images"], labels: Int[np.ndarray, " images"], classes: int
) -> Float64[np.ndarray, " classes"]:
    images = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels[right], minlength=classes)
    return np.where(images > 0, hits / np.maximum(images, 1), np.nan)


def _confusion(
    labels: Int[np.ndarray, " images"], given: Int64[np.ndarray, " images"]
) -> Int64[np.ndarray, "found 3"]:
    pairs, images = np.unique(np.stack([labels, given], axis=1), axis=0, return_counts=True)
    return np.column_stack([pairs, images]).astype(np.int64)


def _places(
    products: Float32[np.ndarray, "images classes"], labels: Int[np.ndarray, " images"], shown: int
) -> tuple[Int64[np.ndarray, " images"], Int64[np.ndarray, "images shown"]]:
    """Return the rank of each image's right class, and the classes that come first."""
    scores = np.nan_to_num(products, nan=_LOWEST, neginf=_LOWEST)  # no number is no better
    places = np.arange(len(scores))
    right = scores[places, labels]
    scores[places, labels] = -np.inf
    before = (scores >= right[:, None]).sum(axis=1)
    best = np.empty((len(scores), shown), np.int64)
    for place in range(shown):
        highest = scores.argmax(axis=1)
        best[:, place] = np.where(before == place, labels, highest)
        taken = before != place  # the right class moves wrong ones back
        scores[places[taken], highest[taken]] = -np.inf
    return before + 1, best
