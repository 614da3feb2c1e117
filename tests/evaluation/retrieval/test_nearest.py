"""What is found first equals a brute force in float64, ties and numbers that are none included."""

import numpy as np
import pytest
import torch

from tests.support.processes import run_in_world
from vlm.distributed.groups import world_group
from vlm.errors import VlmError
from vlm.evaluation.retrieval.comparison import compare


def nearest(queries, candidates, **options):
    """Return the first images, with every seventh query's first candidate correct: no matter."""
    few = min(len(queries), len(candidates))
    matches = np.stack([np.arange(0, few, 7)] * 2, axis=1)
    return compare(queries, candidates, matches, **options).first_image


def brute_force(queries, candidates):
    products = (queries.astype(np.float64) @ candidates.astype(np.float64).T).astype(np.float32)
    products = np.where(np.isnan(products), -np.inf, products)
    best = products.argmax(axis=1)  # the first of several
    return np.where(products.max(axis=1) == -np.inf, -1, best)


def levels(seed, queries=70, candidates=53, dim=6):
    """Return vectors of few levels, so that many products are exactly equal."""
    rng = np.random.default_rng(seed)
    return tuple(
        (rng.integers(-2, 3, (count, dim)) / 4).astype(np.float32)
        for count in (queries, candidates)
    )


@pytest.mark.slow
@pytest.mark.parametrize("tile", [1, 7, 64, None])
@pytest.mark.parametrize("seed", range(4))
def test_the_first_of_the_best_is_found_whatever_the_tile(seed, tile):
    # Tiles of one pair take a millisecond each: fewer texts, with as many equal images.
    queries, candidates = levels(seed, queries=12 if tile == 1 else 70)
    assert nearest(queries, candidates, tile=tile).tolist() == (
        brute_force(queries, candidates).tolist()
    )


@pytest.mark.parametrize("tile", [8, 100, None])
def test_of_equal_images_the_first_is_found_though_float32_products_differ(tile):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40, 512)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    candidates = np.concatenate([vectors, vectors[::-1], vectors])
    queries = (vectors + 0.05 * rng.standard_normal(vectors.shape)).astype(np.float32)
    assert nearest(queries, candidates, tile=tile).tolist() == list(range(40))


def test_near_ties_are_decided_by_float64():
    rng = np.random.default_rng(1)
    query = rng.standard_normal((1, 256)).astype(np.float32)
    query /= np.linalg.norm(query)
    candidates = query.repeat(300, 0)
    noise = rng.integers(-1, 2, candidates.shape) * np.float32(2**-24)
    candidates = (candidates + noise).astype(np.float32)
    assert nearest(query, candidates, tile=32) == brute_force(query, candidates)


def test_what_is_no_number_is_found_only_where_nothing_else_is():
    queries, candidates = levels(3)
    queries[4], candidates[[0, 9]] = np.nan, np.nan
    found = nearest(queries, candidates, tile=16)
    assert found.tolist() == brute_force(queries, candidates).tolist()
    assert found[4] == -1


def test_no_queries_find_nothing_and_without_candidates_nothing_is_found():
    queries, candidates = levels(0)
    assert nearest(queries[:0], candidates).tolist() == []
    assert nearest(queries, candidates[:0]).tolist() == [-1] * len(queries)


def test_vectors_of_another_width_are_refused():
    queries, candidates = levels(0)
    with pytest.raises(VlmError, match="width 6 with vectors of width 5"):
        nearest(queries, candidates[:, :5])


def _on_a_rank(rank):
    queries, candidates = levels(5)
    return torch.from_numpy(nearest(queries, candidates, tile=16, group=world_group()))


@pytest.mark.distributed
def test_ranks_that_share_the_work_all_get_the_whole_answer():
    expected = brute_force(*levels(5)).tolist()
    for found in run_in_world(_on_a_rank, 3):
        assert found.tolist() == expected
