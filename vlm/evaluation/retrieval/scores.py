"""Scores of a benchmark from exact ranks: recalls, median rank, reciprocal rank, intervals."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

from vlm.errors import VlmError
from vlm.evaluation.bootstrap import interval_of, resampled_means
from vlm.evaluation.retrieval.metrics import (
    NOT_FOUND,
    Ranks,
    mean_recall,
    mean_reciprocal_rank,
    median_rank,
    recall_at,
)
from vlm.evaluation.retrieval.pairs import Texts, linked_groups

CUTOFFS = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")

_FEWEST_CASES = 10


def check_cutoffs(cutoffs: Sequence[int]) -> None:
    """Refuse cutoffs that no recall can have.

    Raises:
        VlmError: there are none, or one is less than 1.
    """
    if not cutoffs or min(cutoffs) < 1:
        raise VlmError(f"cutoffs are {list(cutoffs)}; expected numbers of at least 1")


def scores_of(ranks: Mapping[str, Ranks], cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Return recalls, mean recall, median rank and mean reciprocal rank of every language.

    Args:
        ranks: By language.
        cutoffs: The k of the recalls.
    """
    scores: dict[str, float] = {}
    for language, of_language in ranks.items():
        recalls = {
            f"{language}/{direction}/recall@{k}": recall_at(of_language[direction], k)
            for direction in DIRECTIONS
            for k in cutoffs
        }
        scores |= recalls
        scores[f"{language}/mean_recall"] = mean_recall(list(recalls.values()))
        for direction in DIRECTIONS:
            scores[f"{language}/{direction}/median_rank"] = median_rank(of_language[direction])
            scores[f"{language}/{direction}/mrr"] = mean_reciprocal_rank(of_language[direction])
    return scores


def intervals_of(
    ranks: Mapping[str, Ranks],
    texts: Mapping[str, Texts],
    *,
    images: int,
    cutoffs: Sequence[int] = CUTOFFS,
) -> dict[str, tuple[float, float]]:
    """Return 95 % bootstrap intervals of the scores that are means, under the keys of `scores_of`.

    Images are drawn together with all texts and images that correct pairs link them to, so that
    captions of one image, and images of one concept, count as one case. A language with fewer than
    ten cases has no interval: of one case every draw is the same.

    Args:
        ranks: By language.
        texts: By language, with the correct pairs.
        images: Number of images in the benchmark.
        cutoffs: The k of the recalls.
    """
    intervals: dict[str, tuple[float, float]] = {}
    for language, of_language in ranks.items():
        own = texts[language]
        of_text, of_image = linked_groups(own.matches, texts=len(own.texts), images=images)
        if len(np.unique(of_image[own.matches[:, 1]])) < _FEWEST_CASES:
            continue
        sets = {
            "text_to_image": of_text,
            "image_to_text": of_image[np.unique(own.matches[:, 1])],
        }
        values, groups, names = [], [], []
        for direction in DIRECTIONS:
            for name, of_queries in _values(of_language[direction], cutoffs):
                names.append(f"{language}/{direction}/{name}")
                values.append(of_queries)
                groups.append(sets[direction])
        means = resampled_means(values, groups)
        recalls = [number for number, name in enumerate(names) if "recall@" in name]
        intervals |= {name: interval_of(row) for name, row in zip(names, means, strict=True)}
        intervals[f"{language}/mean_recall"] = interval_of(means[recalls].mean(axis=0))
    return intervals


def _values(
    ranks: Int64[np.ndarray, " queries"], cutoffs: Sequence[int]
) -> list[tuple[str, NDArray[np.float64]]]:
    found = [(f"recall@{k}", (ranks <= k).astype(np.float64)) for k in cutoffs]
    return [*found, ("mrr", np.where(ranks == NOT_FOUND, 0.0, 1 / ranks))]
