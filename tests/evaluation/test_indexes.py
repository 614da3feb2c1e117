"""Approximate search is measured against brute force, in every direction."""

from dataclasses import replace

import faiss
import numpy as np
import pytest

from vlm.errors import SearchIndexError
from vlm.evaluation.config import IndexPlan
from vlm.evaluation.indexes import (
    ann_recall,
    answers,
    cases_of,
    compare_indexes,
    compare_with_exact,
    loss_of,
    milliseconds_per_query,
    sweep,
)
from vlm.search.index import Hits, VectorIndex


def unit(vectors):
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def two_kinds(concepts=200, dim=24, *, seed=0):
    """Make two images and one text of each concept, and the gap between both kinds."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(concepts, dim))
    gap = 3 * rng.normal(size=dim)
    images = unit(np.tile(centres, (2, 1)) + 0.5 * rng.normal(size=(2 * concepts, dim)) + gap)
    texts = unit(centres + 0.5 * rng.normal(size=(concepts, dim)) - gap)
    matches = np.stack([np.arange(2 * concepts) % concepts, np.arange(2 * concepts)], axis=1)
    return images, texts, matches


def naive_recall(queries, candidates, matches, k):
    cosines = queries.astype(np.float64) @ candidates.T
    right = np.zeros(cosines.shape, bool)
    right[tuple(matches.T)] = True
    best = np.where(right, cosines, -np.inf).max(axis=1, keepdims=True)
    return np.mean(((cosines >= best) & ~right).sum(axis=1) < k)


@pytest.fixture(scope="module")
def cases():
    images, texts, matches = two_kinds()
    return cases_of(images, {"en": (texts, matches)})


def test_cases_are_both_directions_of_every_language_and_images_among_themselves():
    images, texts, matches = two_kinds(concepts=20)
    found = cases_of(images, {"zh": (texts, matches), "en": (texts, matches[:7])})
    assert [case.name for case in found] == [
        "zh text to image", "zh image to text", "en text to image", "en image to text",
        "image to image",
    ]  # fmt: skip
    assert [len(case.queries) for case in found] == [20, 40, 20, 7, 40]
    with pytest.raises(SearchIndexError, match=r"40 images and \[0\] correct pairs"):
        cases_of(images, {"zh": (texts, matches[:0])})


def test_exact_search_is_brute_force_and_a_flat_index_equals_it(cases):
    for case in cases:
        found = compare_with_exact(VectorIndex.build(case.candidates, "Flat"), case)
        assert found.ann_recall == {1: 1, 5: 1, 10: 1}
        assert found.index_recall == found.exact_recall
        assert (found.vectors, found.dim) == case.candidates.shape
        assert found.reached_target
        if case.matches is not None:
            for k, recall in found.exact_recall.items():
                naive = naive_recall(case.queries, case.candidates, case.matches, k)
                assert recall == pytest.approx(naive)
    assert cases[-1].name == "image to image"
    cosines = cases[-1].queries.astype(np.float64) @ cases[-1].candidates.T
    np.fill_diagonal(cosines, -np.inf)
    expected = -np.sort(-cosines, axis=1)[:, :10]
    np.testing.assert_allclose(cases[-1].nearest, expected, atol=1e-6)


def test_the_share_of_neighbours_found_is_that_of_sets(cases):
    for case in cases:
        rows = np.arange(len(case.queries))
        index = VectorIndex.build(case.candidates, "IVF16,Flat@nprobe=2")
        hits = answers(index, case, rows=rows)
        cosines = case.queries.astype(np.float64) @ case.candidates.T
        if case.matches is None:
            np.fill_diagonal(cosines, -np.inf)
            assert not (hits.ids == rows[:, None]).any()
        order = np.argsort(-cosines, axis=1)
        found = ann_recall(hits, case, rows=rows)
        for k in (1, 10):
            pairs = zip(hits.ids[:, :k].tolist(), order[:, :k].tolist(), strict=True)
            naive = np.mean([len(set(a) & set(b)) / k for a, b in pairs])
            assert found[k] == pytest.approx(naive)
            assert 0.1 < naive < 1


def test_it_does_not_matter_which_of_equal_vectors_is_found():
    images = unit(np.repeat(np.eye(4), 3, axis=0))
    case = cases_of(images, {"en": (unit(np.eye(4)), np.array([[0, 0]]))})[0]
    ids = np.array([[1, 2], [5, 4], [0, 6], [-1, -1]])
    hits = Hits(np.ones((4, 2), np.float32), ids)
    assert ann_recall(hits, case, ks=[1, 2], rows=np.arange(4)) == {1: 2 / 4, 2: 5 / 8}


def test_fewer_candidates_than_are_looked_for_are_all_found():
    images, texts, matches = two_kinds(concepts=2)
    for case in cases_of(images, {"en": (texts, matches)}):
        found = compare_with_exact(VectorIndex.build(case.candidates, "HNSW8"), case)
        assert found.ann_recall == {1: 1, 5: 1, 10: 1}


def test_a_search_parameter_is_tuned_by_half_of_the_queries_and_judged_by_the_others(cases):
    case = cases[0]
    index = VectorIndex.build(case.candidates, "IVF16,Flat")
    found = compare_with_exact(index, case, target_recall=0.8)
    ((name, value),) = found.parameters.items()
    assert (name, found.reached_target) == ("nprobe", True)
    assert 1 < value < 16
    half = np.random.default_rng(0).permutation(len(case.queries))
    tuning, judged = np.split(half, [len(half) // 2])
    shares = []
    for nprobe in (value - 1, value):
        index.set_parameter("nprobe", nprobe)
        hits = answers(index, case, rows=tuning)
        shares.append(ann_recall(hits, case, rows=tuning)[10])
    assert shares[0] < 0.8 <= shares[1]
    hits = answers(index, case, rows=judged)
    assert found.ann_recall == ann_recall(hits, case, rows=judged)


def test_queries_of_another_kind_lose_more():
    # Texts lie on the other side of the gap, and their neighbours in more cells.
    images, texts, matches = two_kinds(concepts=1000)
    to_images, _, among_images = cases_of(images, {"en": (texts, matches)})
    index = VectorIndex.build(images, "IVF32,Flat@nprobe=4")
    lost = [
        1 - compare_with_exact(index, case).ann_recall[10] for case in (to_images, among_images)
    ]
    assert lost[0] > 1.2 * lost[1] > 0


def test_a_coarse_index_misses_its_target_and_loses_enough_to_be_told(cases):
    found = compare_with_exact(VectorIndex.build(cases[0].candidates, "IVF4,PQ2x4"), cases[0])
    assert not found.reached_target
    lost = 100 * (found.exact_recall[1] - found.index_recall[1])
    assert lost > 1
    said = loss_of(found)
    assert said.startswith(f"IVF4,PQ2x4 costs {lost:.1f} points of R@1 in en text to image: ")


def test_a_point_of_recall_is_no_loss_worth_telling(cases):
    flat = compare_with_exact(VectorIndex.build(cases[0].candidates, "Flat"), cases[0])
    for exact, index, told in ((0.5, 0.49, False), (0.5, 0.4899, True), (0.5, 0.6, False)):
        changed = replace(flat, exact_recall={1: exact}, index_recall={1: index})
        assert (loss_of(changed) is not None) == told
    assert loss_of(replace(flat, exact_recall={}, index_recall={})) is None


def test_a_sweep_goes_from_least_to_most_effort(cases):
    points = sweep(VectorIndex.build(cases[0].candidates, "IVF12,Flat"), cases[0])
    assert [point.value for point in points] == [1, 2, 4, 8, 12]
    recalls = [point.ann_recall for point in points]
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[-1] == 1
    expected = compare_with_exact(VectorIndex.build(cases[0].candidates, "Flat"), cases[0])
    assert points[-1].recall_at_1 == expected.exact_recall[1]
    assert all(point.milliseconds_per_query > 0 for point in points)
    (only,) = sweep(VectorIndex.build(cases[-1].candidates, "Flat"), cases[-1])
    assert (only.value, only.ann_recall, only.recall_at_1) == (None, 1, None)


def test_every_factory_meets_every_case_and_images_are_indexed_once(monkeypatch):
    images, texts, matches = two_kinds()
    built, build = [], VectorIndex.build

    def counting(vectors, factory="exact", **options):
        built.append((factory, len(vectors)))
        return build(vectors, "Flat" if factory == "exact" else factory, **options)

    monkeypatch.setattr(VectorIndex, "build", counting)
    plan = IndexPlan(factories=["SQ8", "auto"], memory=str(400 * 24 * 4))
    found = compare_indexes(images, {"en": (texts, matches)}, plan, device="cpu").comparisons
    assert [each for each in built if each[0] != "exact"] == [
        ("SQ8", 400), ("SQ8", 200), ("Flat", 400), ("Flat", 200),
    ]  # fmt: skip
    assert [(each.factory, each.vectors) for each in found] == [
        (called, count) for called in ("SQ8", "auto: Flat") for count in (400, 200, 400)
    ]


def test_time_is_taken_on_one_thread_and_the_threads_come_back(cases):
    index, seen = VectorIndex.build(cases[0].candidates, "Flat"), []

    def search(queries, k):
        seen.append((faiss.omp_get_max_threads(), len(queries), k))

    index.search = search
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    try:
        assert milliseconds_per_query(index, cases[0].queries[:5]) > 0
        assert seen == [(1, 32, 10)] * 16
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(before)
