"""Intervals of scores equal a bootstrap written out with loops; scores equal their definitions."""

import numpy as np
import pytest

from vlm.evaluation.retrieval.metrics import NOT_FOUND, intervals_of, scores_of
from vlm.evaluation.retrieval.pairs import Texts


def concepts(seed):
    """Return texts with several images each, images with several texts, and ranks of both."""
    rng = np.random.default_rng(seed)
    matches = np.concatenate([
        [(2 * case + text, case) for case in range(30) for text in (0, 1)],  # two captions each
        [(60 + case, 30 + 3 * case + image) for case in range(8) for image in range(3)],  # concepts
    ])  # fmt: skip
    ranks = {
        "text_to_image": rng.integers(1, 20, 68),
        "image_to_text": rng.integers(1, 20, 54),  # of 56 images, two have no text
    }
    return Texts(texts=[f"text {number}" for number in range(68)], matches=matches), ranks


def cases_of_texts_and_images():
    of_text = np.array([case for case in range(30) for _ in (0, 1)] + list(range(30, 38)))
    of_image = np.array([*range(30), *np.arange(30, 38).repeat(3)])
    return of_text, of_image


def test_intervals_equal_those_of_drawing_cases_one_by_one():
    texts, ranks = concepts(0)
    found = intervals_of({"zh": ranks}, {"zh": texts}, images=56, cutoffs=[1, 5])
    of_text, of_image = cases_of_texts_and_images()
    resampled = []
    for drawn in np.random.default_rng(0).integers(38, size=(1000, 38), dtype=np.int32):
        row = []
        for of_query, own in ((of_text, "text_to_image"), (of_image, "image_to_text")):
            queries = np.concatenate([np.flatnonzero(of_query == case) for case in drawn])
            values = ranks[own][queries]
            row += [(values <= 1).mean(), (values <= 5).mean(), (1 / values).mean()]
        resampled.append(row)
    table = np.array(resampled)
    names = [
        f"zh/{direction}/{name}"
        for direction in ("text_to_image", "image_to_text")
        for name in ("recall@1", "recall@5", "mrr")
    ]
    expected = {
        name: np.quantile(column, [0.025, 0.975])
        for name, column in zip(names, table.T, strict=True)
    }
    expected["zh/mean_recall"] = np.quantile(table[:, [0, 1, 3, 4]].mean(axis=1), [0.025, 0.975])
    assert found.keys() == expected.keys()
    for name, bounds in expected.items():
        assert found[name] == pytest.approx(tuple(bounds)), name


def test_every_interval_holds_its_score_and_medians_have_none():
    texts, ranks = concepts(1)
    scores = scores_of({"zh": ranks, "en": ranks})
    intervals = intervals_of({"zh": ranks, "en": ranks}, {"zh": texts, "en": texts}, images=56)
    assert {name for name in scores if "median" not in name} == set(intervals)
    for name, (low, high) in intervals.items():
        assert low <= scores[name] <= high
        assert low < high


def test_a_query_that_found_nothing_counts_as_missed():
    texts, ranks = concepts(2)
    lost = {direction: np.full_like(found, NOT_FOUND) for direction, found in ranks.items()}
    assert set(intervals_of({"en": lost}, {"en": texts}, images=56).values()) == {(0.0, 0.0)}
    assert scores_of({"en": lost})["en/text_to_image/median_rank"] == np.inf


def test_of_few_cases_there_is_no_interval():
    matches = np.array([(text, text // 5) for text in range(45)])  # nine images, five captions
    few = Texts(texts=[f"text {number}" for number in range(45)], matches=matches)
    ranks = {"text_to_image": np.arange(45) % 9 + 1, "image_to_text": np.arange(9) + 1}
    assert intervals_of({"zh": ranks}, {"zh": few}, images=9) == {}
