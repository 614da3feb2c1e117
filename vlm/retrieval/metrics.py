"""Retrieval metrics as pure functions of what a search returned."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

NOT_FOUND = np.iinfo(np.int64).max
"""Rank of a query none of whose correct answers is among its hits."""


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
    scores = np.where(np.isnan(scores), -np.inf, scores)  # what is no number is no better
    best = np.where(correct, scores, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    wrong_before = ((scores >= best) & ~correct & (ids >= 0)).sum(axis=1)
    return np.where(correct.any(axis=1), wrong_before + 1, NOT_FOUND).astype(np.int64)


def recall_at(ranks: Int[np.ndarray, " queries"], k: int) -> float:
    """Return the share in [0, 1] of the queries with a correct answer among their first `k`."""
    return float((ranks <= k).mean())


def mean_recall(recalls: Sequence[float]) -> float:
    """Return the mean of recalls at several `k`, and of both directions where given."""
    return float(np.mean(recalls))
