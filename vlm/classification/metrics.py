"""Scores of a classification, as pure functions of what was compared."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int
from numpy.typing import NDArray

TOP = 5
_LOWEST = float(np.finfo(np.float32).min)
_TILE = 1 << 22  # scores that are looked at together: 16 MiB of them


@dataclass(frozen=True, kw_only=True)
class ClassificationScores:
    """How well pictures were told apart."""

    top1: float
    """Share in [0, 1] of the pictures whose right class scores highest."""
    top5: float | None
    """Share whose right class is among the first five; None where there are fewer classes."""
    confusion: Int[np.ndarray, "classes classes"]
    """Number of pictures by their right class (rows) and the class they were given (columns)."""

    @property
    def class_recall(self) -> Float[np.ndarray, " classes"]:
        """The share of each class's pictures that were given their class; nan where it has none."""
        pictures = self.confusion.sum(axis=1)
        shares = np.diagonal(self.confusion) / np.maximum(pictures, 1)
        return np.where(pictures > 0, shares, np.nan)

    @property
    def mean_class_recall(self) -> float:
        """The mean of `class_recall` over the classes that have pictures."""
        return float(np.nanmean(self.class_recall))


def score_classification(
    images: Float32[np.ndarray, "images dim"],
    classes: Float32[np.ndarray, "classes dim"],
    labels: Int[np.ndarray, " images"],
) -> ClassificationScores:
    """Give every picture the class whose vector has the largest product with its own.

    A wrong class with the same score as the right one comes before it, so that a model which gives
    all classes the same score is always wrong. Among equal wrong classes the first is given.

    Args:
        images: A vector a picture; at least one.
        classes: A vector a class; at least one.
        labels: The number of each picture's right class.
    """
    given = np.empty(len(images), np.int64)
    before = np.empty(len(images), np.int64)
    rows = max(1, _TILE // len(classes))
    for start in range(0, len(images), rows):
        part = slice(start, start + rows)
        scores = images[part] @ classes.T
        scores = np.nan_to_num(scores, nan=_LOWEST, neginf=_LOWEST)  # no number is no better
        own = np.arange(len(scores)), labels[part]
        before[part], given[part] = _places(scores, scores[own], own)
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (labels, given), 1)
    return ClassificationScores(
        top1=float((before == 0).mean()),
        top5=float((before < TOP).mean()) if len(classes) >= TOP else None,
        confusion=confusion,
    )


def baselines(pictures: Int[np.ndarray, " classes"]) -> dict[str, ClassificationScores]:
    """Return what no model is needed for: a random order of the classes, and the largest first.

    Args:
        pictures: Number of pictures of each class.
    """
    share = pictures / pictures.sum()
    count = len(pictures)
    largest = np.zeros((count, count), np.int64)
    largest[:, int(np.argmax(pictures))] = pictures
    enough = count >= TOP
    return {
        "random": ClassificationScores(
            top1=1 / count,
            top5=TOP / count if enough else None,
            confusion=np.ones((count, count), np.int64),
        ),
        "majority": ClassificationScores(
            top1=float(share.max()),
            top5=float(np.sort(share)[-TOP:].sum()) if enough else None,
            confusion=largest,
        ),
    }


def _places(
    scores: Float32[np.ndarray, "images classes"],
    right: Float32[np.ndarray, " images"],
    own: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how many wrong classes come before each picture's right one, and the first class."""
    reaches = scores >= right[:, None]
    reaches[own] = False
    before = reaches.sum(axis=1)
    scores[own] = -np.inf
    return before, np.where(before == 0, own[1], scores.argmax(axis=1))
