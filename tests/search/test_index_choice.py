"""`auto` takes the best index that fits."""

import numpy as np
import pytest

from vlm.errors import SearchIndexError
from vlm.search.index import VectorIndex, choose_factory

FLAT, HNSW = 4 * 512, 4 * 512 + 256 + 16


@pytest.mark.parametrize(
    ("count", "memory", "recall", "expected"),
    [
        (9_999, 9_999 * FLAT, 0.95, "Flat"),
        (10_000, 10_000 * FLAT, 0.95, "IVF256,SQ8"),  # flat is slower from here on
        (10_000, 10_000 * HNSW, 0.95, "HNSW32"),
        (10_000, 10_000 * HNSW - 1, 0.95, "IVF256,Flat"),  # 512 cells would have 20 vectors each
        (1_000_000, 1_000_000 * HNSW, 0.95, "HNSW32"),
        (1_000_000, 1_000_000 * HNSW - 1, 0.95, "IVF4096,Flat"),
        (1_000_000, 1_000_000 * (FLAT + 8) + 4096 * FLAT - 1, 0.95, "IVF4096,SQ8"),
        (1_000_000, 1_000_000 * 520 + 4096 * FLAT - 1, 0.95, "IVF4096,PQ256np"),
        (1_000_000, 1_000_000 * 264 + 4096 * FLAT, 0.95, "IVF4096,PQ128np"),
        (1_000_000, 1_000_000 * 136 + 4096 * FLAT, 0.95, "IVF4096,PQ64np"),
        (10_000_000, 10_000_000 * FLAT, 1.0, "Flat"),
        (1, FLAT, 0.5, "Flat"),
        (30, 30 * FLAT - 1, 0.5, "IVF1,SQ8"),
    ],
)
def test_the_first_index_that_fits_is_chosen(count, memory, recall, expected):
    found = choose_factory(count, 512, memory_budget_bytes=memory, target_recall=recall)
    assert found == expected


def test_what_fits_nowhere_says_what_it_would_need():
    with pytest.raises(SearchIndexError, match=r"fits into 1000 bytes; expected at least \d+, for"):
        choose_factory(10_000, 512, memory_budget_bytes=1000)
    with pytest.raises(SearchIndexError, match="expected at least 20480000, for Flat"):
        choose_factory(10_000, 512, memory_budget_bytes=10_000 * FLAT - 1, target_recall=1.0)


@pytest.mark.parametrize(
    ("count", "dim", "recall"), [(0, 8, 0.9), (8, 0, 0.9), (8, 8, 0.0), (8, 8, 1.01)]
)
def test_sizes_and_recalls_out_of_their_ranges_are_refused(count, dim, recall):
    with pytest.raises(SearchIndexError, match=f"index of {count} vectors of width {dim}"):
        choose_factory(count, dim, memory_budget_bytes=10**9, target_recall=recall)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bytes_per_vector", "expected"),
    [
        (256, "Flat"),
        (255, "IVF64,SQ8"),
        (77, "IVF64,SQ8"),
        (75, "IVF64,PQ32np"),
        (44, "IVF64,PQ8np"),
    ],
)
def test_what_is_chosen_keeps_within_its_budget_once_built(bytes_per_vector, expected):
    vectors = np.random.default_rng(0).normal(size=(4000, 64)).astype(np.float32)
    factory = choose_factory(4000, 64, memory_budget_bytes=4000 * bytes_per_vector)
    assert factory == expected
    built = VectorIndex.build(vectors, factory)
    assert built.bytes_per_vector < bytes_per_vector + 0.5
