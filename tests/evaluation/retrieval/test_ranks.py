"""Ranks by tiles equal a count over the whole matrix: ties, duplicates, NaN, ranks, and peers."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.processes import run_in_world
from vlm.distributed.groups import world_group
from vlm.errors import VlmError
from vlm.evaluation.retrieval.comparison import compare
from vlm.evaluation.retrieval.metrics import NOT_FOUND, first_correct_ranks, recall_at

TILES = [1, 2, 3, 7, 16, None]


def exact_ranks(texts, images, matches, **options):
    found = compare(texts, images, matches, **options)
    return found.text_to_image, found.image_to_text


def whole_matrix_ranks(queries, candidates, matches):
    """Count for each query, over all scores at once, the wrong ones no less than its best."""
    with np.errstate(invalid="ignore"):
        scores = (queries.astype(np.float64) @ candidates.astype(np.float64).T).astype(np.float32)
    scores[np.isnan(scores)] = -np.inf
    correct = np.zeros(scores.shape, bool)
    correct[matches[:, 0], matches[:, 1]] = True
    ranks = []
    for row, own in zip(scores, correct, strict=True):
        wrong = (row[~own] >= row[own].max()).sum() if own.any() else NOT_FOUND - 1
        ranks.append(int(wrong) + 1)
    return ranks


def random_matches(rng, queries, candidates):
    """Return pairs in no order, some repeated; some queries have many answers, some have none."""
    matches = np.argwhere(rng.random((queries, candidates)) < rng.choice([0.02, 0.1, 0.4]))
    return rng.permutation(np.concatenate([matches, matches[::3]]))


def unit_vectors(rng, count, dim):
    vectors = rng.standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def check(queries, candidates, matches, tile):
    expected = whole_matrix_ranks(queries, candidates, matches)
    reverse = whole_matrix_ranks(candidates, queries, matches[:, ::-1])
    ranks = exact_ranks(queries, candidates, matches, tile=tile)
    assert {side.dtype for side in ranks} == {np.dtype(np.int64)}
    assert [side.tolist() for side in ranks] == [expected, reverse]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("seed", range(12))
def test_ranks_with_many_equal_scores_equal_a_count_over_the_whole_matrix(seed, tile):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 25, 2)
    queries, candidates = (rng.integers(-1, 2, (size, 3)).astype(np.float32) for size in sizes)
    check(queries, candidates, random_matches(rng, *sizes), tile)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [4, 13, 61, None])
@pytest.mark.parametrize("dim", [1, 3, 64, 515])
def test_equal_vectors_tie_wherever_they_stand(dim, tile):
    rng = np.random.default_rng(dim)
    queries, candidates = unit_vectors(rng, 67, dim), unit_vectors(rng, 131, dim)
    candidates = candidates[rng.integers(0, 20, len(candidates))]
    queries = queries[rng.integers(0, 30, len(queries))]
    check(queries, candidates, random_matches(rng, 67, 131), tile)


@pytest.mark.parametrize("noise", [1e-8, 1e-7, 1e-5])
def test_scores_closer_than_float32_products_can_tell_are_told_apart(noise):
    rng = np.random.default_rng(7)
    queries, candidates = (
        unit_vectors(rng, 1, 512) + noise * unit_vectors(rng, count, 512) for count in (90, 200)
    )
    check(queries, candidates, random_matches(rng, 90, 200), 64)


def test_a_model_that_gives_every_image_one_vector_finds_nothing():
    vector = unit_vectors(np.random.default_rng(0), 1, 512)
    matches = np.stack([np.arange(300), np.arange(300) % 100], axis=1)
    ranks, reverse = exact_ranks(vector.repeat(300, 0), vector.repeat(100, 0), matches)
    assert ranks.tolist() == [100] * 300
    assert reverse.tolist() == [298] * 100


@pytest.mark.parametrize("tile", [2, None])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_no_better_than_minus_infinity(value, tile):
    rng = np.random.default_rng(3)
    queries, candidates = unit_vectors(rng, 9, 4), unit_vectors(rng, 12, 4)
    queries[[1, 4], [0, 2]] = value
    candidates[[0, 5, 7], [3, 2, 1]] = value
    check(queries, candidates, random_matches(rng, 9, 12), tile)


def test_the_rule_is_that_of_first_correct_ranks():
    rng = np.random.default_rng(5)
    queries, candidates = (rng.integers(-1, 2, (size, 3)).astype(np.float32) for size in (20, 30))
    scores = queries @ candidates.T
    order = np.argsort(-scores, axis=1)
    matches = random_matches(rng, 20, 30)
    expected = first_correct_ranks(np.take_along_axis(scores, order, 1), order, matches)
    assert exact_ranks(queries, candidates, matches)[0].tolist() == expected.tolist()


def test_queries_without_a_correct_answer_are_not_found():
    queries, none = np.eye(4, dtype=np.float32), np.zeros((0, 2), np.int64)
    assert exact_ranks(queries, queries, none)[0].tolist() == [NOT_FOUND] * 4
    assert exact_ranks(queries, queries, np.array([[2, 2]]))[0].tolist()[1:3] == [NOT_FOUND, 1]
    assert exact_ranks(queries[:0], queries, none)[0].tolist() == []
    assert exact_ranks(queries, queries[:0], none)[0].tolist() == [NOT_FOUND] * 4


def test_arrays_of_half_precision_on_disk_are_read_in_place(tmp_path):
    rng = np.random.default_rng(1)
    features = [unit_vectors(rng, count, 16).astype(np.float16) for count in (30, 50)]
    for name, array in zip("qc", features, strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    on_disk = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "qc"]
    check(*on_disk, random_matches(rng, 30, 50), 8)
    check(features[0][::-2], np.asfortranarray(features[1]), random_matches(rng, 15, 50), 8)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest result of any operation."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.parametrize("same", [pytest.param(True, marks=pytest.mark.slow), False])
def test_nothing_larger_than_the_features_and_a_tile_is_made(same):
    rng = np.random.default_rng(2)
    texts, images = unit_vectors(rng, 500, 4), unit_vectors(rng, 400, 4)
    if same:  # every score is within the error of float32 of every other
        texts[:], images[:] = texts[0], images[0]
    matches = np.stack([np.arange(500), np.arange(500) % 400], axis=1)
    with LargestTensor() as largest:
        exact_ranks(texts, images, matches, tile=32)
    assert 32 * 32 <= largest.elements <= texts.size


def test_a_program_that_allows_bfloat16_products_gets_the_same_ranks():
    rng = np.random.default_rng(8)
    texts, images = unit_vectors(rng, 600, 64), unit_vectors(rng, 600, 64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        check(texts, images, np.stack([np.arange(600)] * 2, axis=1), 128)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def _ranks_of_case(rank, tile):
    rng = np.random.default_rng(4)
    texts, images = unit_vectors(rng, 103, 8), unit_vectors(rng, 41, 8)
    texts[50:], images[20:40] = texts[:53], images[:20]
    matches = random_matches(rng, 103, 41)
    group = world_group()
    sides = exact_ranks(texts, images, matches, tile=tile, group=group)
    return [torch.from_numpy(ranks) for ranks in sides]


@pytest.mark.distributed
@pytest.mark.parametrize(("processes", "tile"), [(2, 10), (3, 7), (3, 60)])
def test_several_processes_get_the_ranks_of_one(processes, tile):
    expected = _ranks_of_case(0, None)
    assert len(expected[0].unique()) > 5
    for found in run_in_world(_ranks_of_case, processes, tile):
        assert [ranks.tolist() for ranks in found] == [ranks.tolist() for ranks in expected]


@pytest.mark.parametrize(
    ("width", "match", "tile", "message"),
    [
        (3, (0, 0), None, "vectors of width 4 with vectors of width 3"),
        (4, (0, 0), 0, "in tiles of 0"),
        (4, (2, 0), None, r"from \[2, 0\] to \[2, 0\]; expected at least 0 and less than \[2, 5\]"),
        (4, (0, 5), None, "less than"),
        (4, (0, -1), None, "at least 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(width, match, tile, message):
    queries, candidates = np.ones((2, 4), np.float32), np.ones((5, width), np.float32)
    with pytest.raises(VlmError, match=message):
        exact_ranks(queries, candidates, np.array([match]), tile=tile)


def test_vectors_too_long_for_float32_are_refused():
    long = np.full((2, 4), 1e25, np.float32)
    with pytest.raises(VlmError, match="expected unit vectors"):
        exact_ranks(long, long, np.array([[0, 0]]))


def benchmark_case():
    """Return texts, images and pairs: 1 to 7 captions an image, some of them twice.

    Captions that are the same string have one vector; those of two images are right for both.
    """
    rng = np.random.default_rng(6)
    images = unit_vectors(rng, 60, 24)
    owner = np.repeat(np.arange(60), rng.integers(1, 8, 60))
    texts = images[owner] + 0.35 * rng.standard_normal((len(owner), 24)).astype(np.float32)
    pairs = list(enumerate(owner.tolist()))
    for copy, original in [(5, 4), (90, 20), (130, 20), (131, 132)]:
        texts[copy] = texts[original]
        pairs += [(copy, int(owner[original])), (original, int(owner[copy]))]
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    return texts, images, np.array(sorted(set(pairs)))


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recalls_are_those_of_clip_benchmark(k):
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    texts, images, pairs = benchmark_case()
    scores = torch.from_numpy(texts) @ torch.from_numpy(images).T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[tuple(pairs.T)] = True
    ranks = exact_ranks(texts, images, pairs, tile=16)
    for own, found, right in zip(ranks, (scores, scores.T), (positive, positive.T), strict=True):
        recall = (batchify(recall_at_k, found, right, 32, "cpu", k=k) > 0).float().mean().item()
        assert 0.1 < recall < 1
        assert recall_at(own, k) == pytest.approx(recall, abs=1e-6)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # cn_clip's own
@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text"])
def test_recalls_are_those_of_chinese_clip(tmp_path, monkeypatch, direction):
    from cn_clip.eval import evaluation, evaluation_tr

    to_image = direction == "text_to_image"
    script, scorer = ("", evaluation) if to_image else ("_tr", evaluation_tr)
    texts, images, pairs = benchmark_case()
    for kind, features in (("text", texts), ("image", images)):
        write_lines(
            tmp_path / f"{kind}.jsonl",
            [{f"{kind}_id": n, "feature": row.tolist()} for n, row in enumerate(features)],
        )
    query, found = ("text", "image") if to_image else ("image", "text")
    sides = pairs if to_image else pairs[:, ::-1]
    right = {}
    for asked, answer in sides.tolist():
        right.setdefault(asked, []).append(answer)
    reference = tmp_path / "reference.jsonl"
    write_lines(reference, [{f"{query}_id": q, f"{found}_ids": a} for q, a in right.items()])
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)  # the script knows GPUs only
    arguments = [f"--{kind}-feats={tmp_path / kind}.jsonl" for kind in ("image", "text")]
    monkeypatch.setattr(sys, "argv", ["make", *arguments, f"--output={tmp_path / 'top'}"])
    folder = Path(evaluation.__file__).parent
    runpy.run_path(str(folder / f"make_topk_predictions{script}.py"), run_name="__main__")
    scores = scorer.compute_score(str(reference), str(tmp_path / "top"))
    ranks = exact_ranks(texts, images, pairs)[0 if to_image else 1]
    recalls = [100 * recall_at(ranks, k) for k in (1, 5, 10)]
    assert 10 < recalls[0] < 90
    assert [sum(recalls) / 3, *recalls] == pytest.approx(scores, abs=1e-6)
