"""Search is exact, survives a file, and refuses what it cannot answer."""

import numpy as np
import pytest

from vlm.errors import SearchIndexError
from vlm.search.index import VectorIndex


def unit_vectors(count, dim=24, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("k", [1, 5, 200])
def test_search_equals_sorting_every_cosine(k):
    vectors, queries = unit_vectors(200), unit_vectors(17, seed=1)
    hits = VectorIndex.build(vectors).search(queries, k)
    cosines = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    order = np.argsort(-cosines, axis=1)[:, :k]
    assert hits.ids.tolist() == order.tolist()
    np.testing.assert_allclose(hits.scores, np.take_along_axis(cosines, order, 1), atol=1e-6)
    assert (hits.scores.dtype, hits.ids.dtype) == (np.float32, np.int64)


def test_a_vector_finds_itself_first():
    vectors = unit_vectors(50)
    hits = VectorIndex.build(vectors).search(vectors, 1)
    assert hits.ids[:, 0].tolist() == list(range(50))
    np.testing.assert_allclose(hits.scores, 1, atol=1e-6)


@pytest.mark.parametrize("k", [5, 6, 1000])
def test_all_vectors_come_back_where_more_are_asked_for(k):
    hits = VectorIndex.build(unit_vectors(5)).search(unit_vectors(3, seed=1), k)
    assert hits.ids.shape == hits.scores.shape == (3, 5)
    assert [sorted(row) for row in hits.ids.tolist()] == [[0, 1, 2, 3, 4]] * 3


def test_vectors_that_are_not_contiguous_are_searched_as_they_read():
    vectors = np.asfortranarray(unit_vectors(40))
    queries = unit_vectors(20, seed=1)[::2]
    expected = VectorIndex.build(np.ascontiguousarray(vectors)).search(queries.copy(), 3)
    assert VectorIndex.build(vectors).search(queries, 3).ids.tolist() == expected.ids.tolist()


def test_no_queries_give_no_hits():
    hits = VectorIndex.build(unit_vectors(5)).search(np.zeros((0, 24), np.float32), 2)
    assert hits.ids.shape == (0, 2)


def test_an_index_comes_back_from_its_file(tmp_path):
    index, queries = VectorIndex.build(unit_vectors(30)), unit_vectors(4, seed=1)
    index.write(tmp_path / "image.index")
    loaded = VectorIndex.read(tmp_path / "image.index")
    assert (len(loaded), loaded.dim) == (len(index), index.dim) == (30, 24)
    first, second = index.search(queries, 7), loaded.search(queries, 7)
    assert np.array_equal(first.ids, second.ids)
    assert np.array_equal(first.scores, second.scores)


@pytest.mark.parametrize(
    "content", [None, b"", b"no index at all"], ids=["missing", "empty", "text"]
)
def test_a_file_that_is_no_index_is_named(tmp_path, content):
    path = tmp_path / "image.index"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SearchIndexError, match=f"{path} cannot be read as a FAISS index"):
        VectorIndex.read(path)


def test_a_file_cut_short_is_named(tmp_path):
    path = tmp_path / "image.index"
    VectorIndex.build(unit_vectors(30)).write(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SearchIndexError, match=f"{path} cannot be read"):
        VectorIndex.read(path)


@pytest.mark.parametrize(
    ("queries", "k", "said"),
    [
        (np.zeros((2, 23), np.float32), 1, "queries of 23 dimensions; expected 24"),
        (np.zeros((2, 24), np.float32), 0, "found k = 0; expected at least 1"),
        (np.full((2, 24), np.nan, np.float32), 1, "a query that is not finite"),
    ],
    ids=["width", "k", "nan"],
)
def test_what_cannot_be_searched_for_is_refused(queries, k, said):
    with pytest.raises(SearchIndexError, match=said):
        VectorIndex.build(unit_vectors(5)).search(queries, k)
