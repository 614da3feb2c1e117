"""Statistics of cosines by tiles equal those of the whole matrix."""

import math

import numpy as np
import pytest
import torch

from tests.support.processes import run_in_world
from vlm.distributed.groups import world_group
from vlm.evaluation.retrieval.comparison import compare


def case(count=83):
    rng = np.random.default_rng(0)
    texts, images = (rng.standard_normal((rows, 16)) for rows in (count, 37))
    texts, images = (
        (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)
        for array in (texts, images)
    )
    return texts, images, np.argwhere(rng.random((count, 37)) < 0.05)


def record(spread):
    return [spread.count, spread.mean, spread.std, spread.min, spread.max]


@pytest.mark.slow
@pytest.mark.parametrize("tile", [1, 5, 40, None])
def test_correct_and_wrong_cosines_are_summarised_as_over_the_whole_matrix(tile):
    # Tiles of one pair take a millisecond each.
    texts, images, matches = case(20 if tile == 1 else 83)
    cosines = texts.astype(np.float64) @ images.astype(np.float64).T
    correct = np.zeros(cosines.shape, bool)
    correct[tuple(matches.T)] = True
    # The extremes are among the correct pairs, where those of the wrong ones must not find them.
    texts[matches[0, 0]] = images[matches[0, 1]]
    texts[matches[-1, 0]] = -images[matches[-1, 1]]
    cosines = texts.astype(np.float64) @ images.astype(np.float64).T
    found = compare(texts, images, np.concatenate([matches, matches]), tile=tile).cosines
    for spread, values in ((found.correct, cosines[correct]), (found.wrong, cosines[~correct])):
        expected = [len(values), values.mean(), values.std(), values.min(), values.max()]
        assert record(spread) == pytest.approx(expected, abs=1e-7)


def test_cosines_that_are_all_equal_do_not_spread():
    ones = np.full((20, 4), 0.5, np.float32)
    found = compare(ones, ones, np.array([[0, 0]])).cosines
    assert record(found.wrong) == [399, 1, 0, 1, 1]
    assert record(found.correct) == [1, 1, 0, 1, 1]


def test_where_there_is_no_pair_the_statistics_are_no_numbers():
    one = np.ones((1, 1), np.float32)
    wrong = compare(one, one, np.array([[0, 0]])).cosines.wrong
    correct = compare(one, one, np.zeros((0, 2), np.int64)).cosines.correct
    for spread in (wrong, correct):
        assert spread.count == 0
        assert all(math.isnan(number) for number in record(spread)[1:])


def test_vectors_that_are_no_numbers_show():
    texts, images, matches = case()
    texts[matches[0, 0]] = np.nan
    found = compare(texts, images, matches, tile=8).cosines
    for spread in (found.wrong, found.correct):
        assert all(math.isnan(number) for number in record(spread)[1:])


def _statistics(rank):
    found = compare(*case(), tile=7, group=world_group()).cosines
    return torch.tensor([record(found.correct), record(found.wrong)], dtype=torch.float64)


@pytest.mark.distributed
def test_several_processes_find_what_one_finds():
    expected = _statistics(0)
    for found in run_in_world(_statistics, 3):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
