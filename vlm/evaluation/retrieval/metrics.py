"""Retrieval metrics as pure functions of ranks, or of what a search returned."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, Int64, Shaped
from numpy.typing import NDArray

from vlm.errors import VlmError

NOT_FOUND = np.iinfo(np.int64).max
"""Rank of a query none of whose correct answers is among its hits."""

Ranks = Mapping[str, Int64[np.ndarray, " queries"]]
"""By direction, the rank of each query's best correct answer. An image without a caption is a wrong
answer and no query, so the images are those that occur in correct pairs, in their order."""


def first_correct_ranks(
    scores: Float[np.ndarray, "queries hits"],
    ids: Int[np.ndarray, "queries hits"],
    matches: Int[np.ndarray, "matches 2"],
) -> NDArray[np.int64]:
    """Return the rank of each query's best correct answer, counted from 1.

    A wrong answer that scores as high as the best correct one is ranked before it, so that a
    model which gives every candidate the same score finds nothing.

    The ranks up to `k` are those of a search over all candidates if each query has at least
    `k + p` hits, where `p` is the largest number of correct answers of a query (or as many hits
    as there are candidates): the hits then hold `k` wrong answers if there are as many at all.

    Args:
        scores: Scores of the hits, best first.
        ids: The candidates that were hit; -1 where a query has fewer hits.
        matches: Pairs (query, candidate) that are correct.
    """
    candidates = max(int(ids.max(initial=0)), int(matches[:, 1].max(initial=0))) + 1
    queries = np.arange(len(ids))[:, None]
    correct = np.isin(queries * candidates + ids, matches[:, 0] * candidates + matches[:, 1])
    correct &= ids >= 0
    scores = np.where(np.isnan(scores), -np.inf, scores)  # NaN is no better than minus infinity
    best = np.where(correct, scores, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    wrong_before = ((scores >= best) & ~correct & (ids >= 0)).sum(axis=1)
    return np.where(correct.any(axis=1), wrong_before + 1, NOT_FOUND).astype(np.int64)


def recall_at(ranks: Int[np.ndarray, " queries"], k: int) -> float:
    """Return the ratio in [0, 1] of queries with a correct answer among their first `k`."""
    return float((ranks <= k).mean())


def mean_recall(recalls: Sequence[float]) -> float:
    """Return the mean of recalls at several `k`, and of both directions where given."""
    return float(np.mean(recalls))


def median_rank(ranks: Int[np.ndarray, " queries"]) -> float:
    """Return the median of the ranks, at least 1; infinite where half have no correct answer."""
    return float(np.median(np.where(ranks == NOT_FOUND, np.inf, ranks)))


def mean_reciprocal_rank(ranks: Int[np.ndarray, " queries"]) -> float:
    """Return the mean of 1 / rank (MRR), in [0, 1]; a query without a correct answer counts 0."""
    return float(np.where(ranks == NOT_FOUND, 0, 1 / ranks).mean())


def cross_lingual_agreement(
    first: tuple[Shaped[np.ndarray, " images"], Int[np.ndarray, " ranks"]],
    second: tuple[Shaped[np.ndarray, " second_images"], Int[np.ndarray, " second_ranks"]],
    *,
    cutoffs: Sequence[int],
) -> dict[str, float]:
    """Return how often a caption and its translation find the same image.

    Args:
        first: Of the captions in one language, the image that each finds first, less than 0
            where it finds none, and the rank of its best correct one.
        second: The same of their translations, in the same order.
        cutoffs: Numbers `k` of at least 1.

    Returns:
        Ratios in [0, 1] of the pairs of captions: `same_image`, for which both find the same
        image first, correct or wrong; and for each `k` `both@k`, for which both have a correct
        image among their first `k`.

    Raises:
        VlmError: there are no captions, or not as many translations.
    """
    counts = [len(of_one) for language in (first, second) for of_one in language]
    if min(counts) < 1 or len(set(counts)) > 1:
        raise VlmError(
            f"found {counts[0]} and {counts[2]} images with {counts[1]} and {counts[3]} ranks "
            "of captions and their translations; expected as many of each, and at least one"
        )
    found = first[0] >= 0
    ratios = {"same_image": float(((first[0] == second[0]) & found).mean())}
    worse = np.maximum(first[1], second[1])
    return ratios | {f"both@{k}": recall_at(worse, k) for k in cutoffs}
