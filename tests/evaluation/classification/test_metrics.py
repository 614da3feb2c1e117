"""Scores equal a naive count, and CLIP_benchmark's on the same features."""

import tracemalloc

import numpy as np
import pytest
import torch

from vlm.evaluation.classification import metrics
from vlm.evaluation.classification.metrics import baselines, score_classification


def features(rng, rows, dim, *, levels=None):
    """Random unit vectors, or vectors of few levels whose products are often equal."""
    if levels:
        return (rng.integers(-levels, levels + 1, (rows, dim)) / 4).astype(np.float32)
    vectors = rng.normal(size=(rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def naive_orders(scores, labels):
    """Sort the classes of each image, best first; the right one comes after equal ones."""
    return [
        sorted(range(len(row)), key=lambda c: (-row[c], c == label, c))
        for row, label in zip(scores, labels, strict=True)
    ]


def naive_scores(scores, labels):
    """Count over lists: top-1, top-5, the mean over classes, and the confusion that is not 0."""
    classes = len(scores[0])
    ranks, confusion = [], [[0] * classes for _ in range(classes)]
    for order, label in zip(naive_orders(scores, labels), labels, strict=True):
        ranks.append(order.index(label) + 1)
        confusion[label][order[0]] += 1
    recalls = [confusion[c][c] / sum(confusion[c]) for c in range(classes) if sum(confusion[c])]
    top1, top5 = (sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5))
    counted = [
        [right, given, images]
        for right, row in enumerate(confusion)
        for given, images in enumerate(row)
        if images
    ]
    return top1, top5 if classes >= 5 else None, sum(recalls) / len(recalls), counted


@pytest.mark.parametrize("levels", [None, 1], ids=["no ties", "many ties"])
@pytest.mark.parametrize("classes", [1, 2, 4, 5, 13])
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_a_naive_count(monkeypatch, seed, classes, levels):
    monkeypatch.setattr(metrics, "_TILE", 100)  # several tiles
    rng = np.random.default_rng(seed)
    images, weights = features(rng, 60, 6, levels=levels), features(rng, classes, 6, levels=levels)
    labels = rng.integers(0, max(1, classes - 1), 60)  # the last class has no image
    scores = score_classification(images, weights, labels)
    top1, top5, mean, confusion = naive_scores((images @ weights.T).tolist(), labels.tolist())
    assert scores.top1 == pytest.approx(top1)
    assert scores.top5 == (None if top5 is None else pytest.approx(top5))
    assert scores.mean_class_recall == pytest.approx(mean)
    assert scores.confusion.tolist() == confusion


@pytest.mark.parametrize("levels", [None, 1], ids=["no ties", "many ties"])
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 13])
def test_each_images_best_classes_are_those_of_a_sort(monkeypatch, classes, levels):
    monkeypatch.setattr(metrics, "_TILE", 100)
    rng = np.random.default_rng(classes)
    images, weights = features(rng, 60, 6, levels=levels), features(rng, classes, 6, levels=levels)
    labels = rng.integers(0, classes, 60)
    products = images @ weights.T
    orders = naive_orders(products.tolist(), labels.tolist())
    found = score_classification(images, weights, labels)
    assert found.ranks.tolist() == [
        order.index(label) + 1 for order, label in zip(orders, labels.tolist(), strict=True)
    ]
    assert found.best.tolist() == [order[:3] for order in orders]
    expected = [row[order[:3]] for row, order in zip(products, orders, strict=True)]
    np.testing.assert_allclose(found.cosines, expected, atol=1e-6)


class Lookup(torch.nn.Module):
    """A model whose features are given: images and texts are numbers of rows."""

    def __init__(self, images, texts):
        super().__init__()
        self.images, self.texts = torch.from_numpy(images), torch.from_numpy(texts)

    def encode_image(self, numbers):
        return self.images[numbers]

    def encode_text(self, numbers):
        return self.texts[numbers]


@pytest.mark.parametrize("classes", [4, 5, 59])
@pytest.mark.parametrize("seed", range(3))
def test_scores_are_clip_benchmarks(monkeypatch, seed, classes):
    from clip_benchmark.metrics import zeroshot_classification

    # It takes an array of one number for a number, which numpy no longer does.
    def number(one):
        return one.item() if isinstance(one, np.ndarray) else float(one)

    monkeypatch.setattr(zeroshot_classification, "float", number, raising=False)

    rng = np.random.default_rng(seed)
    weights = features(rng, classes, 16)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, 300)])
    images = weights[labels] + 2 * features(rng, len(labels), 16)
    images /= np.linalg.norm(images, axis=1, keepdims=True)

    class Images(list):
        dataset = type("Dataset", (), {"classes": list(range(classes))})

    theirs = zeroshot_classification.evaluate(
        Lookup(images, weights),
        Images([(torch.arange(len(labels)), torch.from_numpy(labels))]),
        lambda texts: torch.tensor([int(text) for text in texts]),
        [str(number) for number in range(classes)],
        ["{c}"],
        "cpu",
        amp=False,
    )
    ours = score_classification(images, weights, labels)
    assert 0.1 < ours.top1 < 1
    assert ours.top1 == pytest.approx(theirs["acc1"], abs=1e-6)
    assert ours.mean_class_recall == pytest.approx(theirs["mean_per_class_recall"], abs=1e-6)
    if classes >= 5:
        assert ours.top5 == pytest.approx(theirs["acc5"], abs=1e-6)
    else:
        assert ours.top5 is None
        assert np.isnan(theirs["acc5"])


def test_a_model_that_scores_all_alike_is_always_wrong():
    images, weights = np.ones((8, 2), np.float32), np.ones((6, 2), np.float32)
    scores = score_classification(images, weights, np.arange(8) % 6)
    assert (scores.top1, scores.top5, scores.mean_class_recall) == (0, 0, 0)
    assert scores.confusion.tolist() == [
        [0, 1, 2], [1, 0, 2], [2, 0, 1], [3, 0, 1], [4, 0, 1], [5, 0, 1],
    ]  # fmt: skip


def test_scores_that_are_no_numbers_are_wrong():
    images = np.array([[np.nan, 0], [1, 0]], np.float32)
    scores = score_classification(images, np.eye(2, dtype=np.float32), np.array([0, 0]))
    assert scores.top1 == 0.5
    assert scores.confusion.tolist() == [[0, 0, 1], [0, 1, 1]]
    assert np.isnan(scores.cosines[0]).all()


def test_a_class_without_images_has_no_recall():
    recall = score_classification(
        np.eye(2, dtype=np.float32), np.eye(3, 2, dtype=np.float32), np.array([0, 1])
    ).class_recall
    np.testing.assert_array_equal(recall, [1, 1, np.nan])


def test_baselines_are_what_guessing_reaches():
    images = np.array([10, 0, 30, 5, 5, 30, 20])
    found = baselines(images)
    assert found["random"].top1 == pytest.approx(1 / 7)
    assert found["random"].top5 == pytest.approx(5 / 7)
    assert found["random"].mean_class_recall == pytest.approx(1 / 7)
    assert found["majority"].top1 == pytest.approx(0.3)
    assert found["majority"].top5 == pytest.approx(0.95)
    assert found["majority"].mean_class_recall == pytest.approx(1 / 6)
    assert baselines(images[2:4])["majority"].top5 is None


def test_many_classes_need_no_matrix_of_them():
    classes = 21_000  # of which a matrix has 3.3 GiB
    rng = np.random.default_rng(0)
    images, weights = features(rng, 50, 8), features(rng, classes, 8)
    labels = rng.integers(0, classes, 50)
    tracemalloc.start()
    try:
        scores = score_classification(images, weights, labels)
        baselines(np.bincount(labels, minlength=classes))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert scores.confusion[:, 2].sum() == 50
    assert peak < 1 << 26


def test_classes_with_equal_vectors_tie_wherever_they_stand():
    """A matrix product of float32 may give two equal columns different values."""
    rng = np.random.default_rng(0)
    images, classes = (rng.normal(size=(rows, 64)).astype(np.float32) for rows in (365, 9))
    labels = rng.integers(0, 18, len(images))
    found = score_classification(images, np.concatenate([classes, classes]), labels)
    assert found.top1 == 0
