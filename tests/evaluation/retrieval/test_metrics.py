"""Ranks and recalls equal a count over every score, ties against the model."""

import math

import numpy as np
import pytest

from vlm.errors import VlmError
from vlm.evaluation.retrieval.metrics import (
    NOT_FOUND,
    cross_lingual_agreement,
    first_correct_ranks,
    mean_recall,
    mean_reciprocal_rank,
    median_rank,
    recall_at,
)


def brute_force_rank(scores, correct):
    """Count the wrong candidates that are not below the best correct one, in plain Python."""
    if not correct:
        return math.inf
    best = max(scores[candidate] for candidate in correct)
    wrong = [c for c in range(len(scores)) if c not in correct and scores[c] >= best]
    return len(wrong) + 1


def random_case(seed):
    """Return scores (queries x candidates), many of them equal, and the correct pairs."""
    rng = np.random.default_rng(seed)
    queries, candidates = rng.integers(1, 12), rng.integers(1, 30)
    levels = rng.choice([2, 5, 10_000])
    scores = rng.integers(0, levels, (queries, candidates)).astype(np.float32) / levels
    matches = np.argwhere(rng.random((queries, candidates)) < rng.choice([0.05, 0.2, 0.6]))
    return scores, rng.permutation(matches).reshape(-1, 2)


def best_hits(scores, hits, seed):
    """Return the best candidates of each query; equal scores come in any order."""
    rng = np.random.default_rng(seed)
    order = np.stack([np.lexsort((rng.random(len(row)), -row)) for row in scores])[:, :hits]
    return np.take_along_axis(scores, order, axis=1), order.astype(np.int64)


def answers_of(matches, queries):
    return [{int(c) for q, c in matches if q == query} for query in range(queries)]


@pytest.mark.parametrize("seed", range(60))
def test_ranks_over_all_candidates_equal_brute_force(seed):
    scores, matches = random_case(seed)
    ranks = first_correct_ranks(*best_hits(scores, scores.shape[1], seed), matches)
    expected = [
        brute_force_rank(row, correct)
        for row, correct in zip(scores, answers_of(matches, len(scores)), strict=True)
    ]
    assert [math.inf if rank == NOT_FOUND else rank for rank in ranks.tolist()] == expected


@pytest.mark.parametrize("k", [1, 3, 100])
@pytest.mark.parametrize("seed", range(40))
def test_recalls_of_few_hits_equal_brute_force(seed, k):
    scores, matches = random_case(seed)
    answers = answers_of(matches, len(scores))
    hits = k + max(len(correct) for correct in answers)
    ranks = first_correct_ranks(*best_hits(scores, hits, seed), matches)
    expected = [
        brute_force_rank(row, correct) <= k for row, correct in zip(scores, answers, strict=True)
    ]
    assert (ranks <= k).tolist() == expected
    assert recall_at(ranks, k) == pytest.approx(sum(expected) / len(expected))


@pytest.mark.parametrize("correct", [[0], [9], [4, 5], list(range(9))], ids=str)
def test_equal_scores_find_nothing_before_every_wrong_candidate(correct):
    matches = np.array([(0, candidate) for candidate in correct])
    ids = np.arange(10)[None]
    ranks = first_correct_ranks(np.full((1, 10), 0.5, np.float32), ids, matches)
    assert ranks.tolist() == [10 - len(correct) + 1]


def test_equal_scores_find_everything_where_all_candidates_are_correct():
    matches = np.array([(0, candidate) for candidate in range(10)])
    ids = np.arange(10)[None]
    ranks = first_correct_ranks(np.full((1, 10), 0.5, np.float32), ids, matches)
    assert ranks.tolist() == [1]


def test_a_query_whose_answers_are_not_among_the_hits_is_not_found():
    ranks = first_correct_ranks(
        np.array([[0.9, 0.8], [0.9, 0.8]], np.float32),
        np.array([[0, 1], [2, 0]]),
        np.array([[0, 2], [1, 2]]),
    )
    assert ranks.tolist() == [NOT_FOUND, 1]
    assert recall_at(ranks, 10**9) == 0.5


def test_empty_places_of_a_search_count_as_no_candidate():
    ranks = first_correct_ranks(
        np.array([[0.9, 0.5, -np.inf], [0.9, -np.inf, -np.inf]], np.float32),
        np.array([[2, 1, -1], [0, -1, -1]]),
        # The -1 of query 1 must not be taken for the last candidate of query 0.
        np.array([[0, 1], [0, 3], [1, 2]]),
    )
    assert ranks.tolist() == [2, NOT_FOUND]


def test_negative_scores_rank_like_others():
    ranks = first_correct_ranks(
        np.array([[-0.1, -0.2, -0.3]], np.float32), np.array([[2, 0, 1]]), np.array([[0, 0]])
    )
    assert ranks.tolist() == [2]


@pytest.mark.parametrize(("k", "expected"), [(1, 0.25), (2, 0.5), (5, 0.75), (100, 0.75)])
def test_recall_is_the_share_of_queries_found_among_the_first(k, expected):
    assert recall_at(np.array([1, 2, 5, NOT_FOUND]), k) == expected


def test_mean_recall_is_the_plain_mean():
    assert mean_recall([0.1, 0.2, 0.6]) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([3], 3),
        ([9, 1, 2], 2),
        ([1, 4], 2.5),
        ([1, 2, NOT_FOUND], 2),
        ([2, NOT_FOUND], math.inf),
        ([NOT_FOUND, NOT_FOUND, NOT_FOUND], math.inf),
    ],
    ids=str,
)
def test_median_rank_is_infinite_where_half_of_the_queries_have_no_answer(ranks, expected):
    assert median_rank(np.array(ranks)) == expected


def test_reciprocal_ranks_are_averaged_and_a_query_without_an_answer_brings_nothing():
    assert mean_reciprocal_rank(np.array([1, 2, 4, NOT_FOUND])) == (1 + 1 / 2 + 1 / 4) / 4
    assert mean_reciprocal_rank(np.array([NOT_FOUND])) == 0


def test_agreement_counts_equal_first_images_and_pairs_that_are_both_found():
    first = np.array([5, 1, 2, 2]), np.array([1, 3, 10, NOT_FOUND])
    second = np.array([5, 1, 2, 0]), np.array([1, 11, 2, 1])
    assert cross_lingual_agreement(first, second, cutoffs=[1, 10, 100]) == {
        "same_image": 0.75,
        "both@1": 0.25,
        "both@10": 0.5,
        "both@100": 0.75,
    }


@pytest.mark.parametrize("counts", [(2, 2, 2, 3), (2, 2, 3, 3), (0, 0, 0, 0)], ids=str)
def test_captions_without_their_translations_are_refused(counts):
    arrays = [np.ones(count, np.int64) for count in counts]
    with pytest.raises(VlmError, match=f"found {counts[0]} and {counts[2]} images"):
        cross_lingual_agreement(tuple(arrays[:2]), tuple(arrays[2:]), cutoffs=[1])


def test_captions_that_find_nothing_do_not_find_the_same():
    first = (np.array([0, -1, 2]), np.array([1, 9, 9]))
    second = (np.array([0, -1, 1]), np.array([1, 9, 1]))
    assert cross_lingual_agreement(first, second, cutoffs=[1]) == {
        "same_image": 1 / 3, "both@1": 1 / 3
    }  # fmt: skip
