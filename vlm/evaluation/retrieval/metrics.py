"""Retrieval metrics as pure functions: ranks, recalls, their intervals, agreement of languages."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, Int64, Shaped
from numpy.typing import NDArray
from scipy.special import gammaln

from vlm.errors import VlmError
from vlm.evaluation.bootstrap import interval_of, resampled_means
from vlm.evaluation.retrieval.pairs import Texts, linked_groups

CUTOFFS = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")

NOT_FOUND = np.iinfo(np.int64).max
"""Rank of a query none of whose correct answers is among its hits."""

Ranks = Mapping[str, Int64[np.ndarray, " queries"]]
"""By direction, the rank of each query's best correct answer. An image without a caption is a wrong
answer and no query, so the images are those that occur in correct pairs, in their order."""

_FEWEST_CASES = 10


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


def recall_by_chance(correct: Int[np.ndarray, " queries"], *, candidates: int, k: int) -> float:
    """Return the recall in [0, 1] that candidates in random order have in the mean.

    A query with c correct answers among n is missed with probability C(n - c, k) / C(n, k).

    Args:
        correct: The number of correct answers of each query.
        candidates: The number of all.
        k: Of the recall.
    """
    wrong, k = candidates - correct, min(k, candidates)
    missed = gammaln(wrong + 1) - gammaln(np.maximum(wrong - k, 0) + 1)
    missed -= gammaln(candidates + 1) - gammaln(candidates - k + 1)
    return float(1 - np.where(wrong >= k, np.exp(missed), 0.0).mean())


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


def check_cutoffs(cutoffs: Sequence[int]) -> None:
    """Refuse cutoffs that no recall can have, by VlmError: none, or one less than 1."""
    if not cutoffs or min(cutoffs) < 1:
        raise VlmError(f"cutoffs are {list(cutoffs)}; expected numbers of at least 1")


def scores_of(ranks: Mapping[str, Ranks], cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Return recalls, mean recall, median rank and mean reciprocal rank of every language."""
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
    """
    intervals: dict[str, tuple[float, float]] = {}
    for language, of_language in ranks.items():
        own = texts[language]
        of_text, of_image = linked_groups(own.matches, texts=len(own.texts), images=images)
        described = np.unique(own.matches[:, 1])
        if len(np.unique(of_image[described])) < _FEWEST_CASES:
            continue
        sets = {"text_to_image": of_text, "image_to_text": of_image[described]}
        values, groups = {}, []
        for direction in DIRECTIONS:
            of_queries, name = of_language[direction], f"{language}/{direction}"
            for k in cutoffs:
                values[f"{name}/recall@{k}"] = (of_queries <= k).astype(np.float64)
            values[f"{name}/mrr"] = np.where(of_queries == NOT_FOUND, 0.0, 1 / of_queries)
            groups += [sets[direction]] * (len(cutoffs) + 1)
        means = resampled_means(list(values.values()), groups)
        recalls = [number for number, name in enumerate(values) if "recall@" in name]
        intervals |= {name: interval_of(row) for name, row in zip(values, means, strict=True)}
        intervals[f"{language}/mean_recall"] = interval_of(means[recalls].mean(axis=0))
    return intervals
