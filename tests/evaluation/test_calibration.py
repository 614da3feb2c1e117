"""A calibration is fitted on one half of the pairs and checked with the other."""

from dataclasses import replace

import numpy as np
import pytest

from tests.builders import of_split
from vlm.calibration import Calibration
from vlm.embedding.embedder import Embedder
from vlm.errors import DataError, VlmError
from vlm.evaluation.calibration import (
    PairCosines,
    calibrate,
    halves_of_images,
    pair_cosines,
    reliability,
)
from vlm.evaluation.config import CalibrationPlan
from vlm.evaluation.retrieval.pairs import RetrievalPairs, Texts, pairs_of_split


class TableEmbedder(Embedder):
    """Looks vectors up instead of computing them."""

    def __init__(self, table):
        self.table, self.embed_dim, self.fingerprint = table, 8, "table"

    def encode_text(self, texts, **_):
        return np.stack([self.table[text] for text in texts])

    def encode_image(self, images, **_):
        return np.stack([self.table[image] for image in images])


def noisy_case(seed, *, concepts=120, noise=0.6):
    """Make two images and a text in each language of every concept, around its direction."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(concepts, 8))

    def vector(concept):
        found = centres[concept] + noise * rng.normal(size=8)
        return (found / np.linalg.norm(found)).astype(np.float32)

    images = [f"image {number}".encode() for number in range(2 * concepts)]
    table = {image: vector(number % concepts) for number, image in enumerate(images)}
    texts = {}
    for language in ("zh", "en"):
        names = [f"{language} {concept}" for concept in range(concepts)]
        table |= {name: vector(concept) for concept, name in enumerate(names)}
        matches = np.stack([np.arange(2 * concepts) % concepts, np.arange(2 * concepts)], axis=1)
        texts[language] = Texts(texts=names, matches=matches)
    return TableEmbedder(table), RetrievalPairs(images=images, texts=texts)


def test_all_pairs_are_correct_or_wrong():
    rng = np.random.default_rng(0)
    texts, images = (rng.normal(size=(n, 4)).astype(np.float32) for n in (5, 7))
    matches = np.array([[0, 0], [0, 1], [4, 6], [0, 1]])
    found = pair_cosines(texts, images, matches)
    table = texts @ images.T
    is_correct = np.zeros(table.shape, bool)
    is_correct[tuple(matches.T)] = True
    np.testing.assert_allclose(found.correct, table[is_correct], rtol=1e-6)
    np.testing.assert_allclose(found.wrong, table[~is_correct], rtol=1e-6)


def test_a_sample_of_wrong_pairs_follows_the_seed():
    rng = np.random.default_rng(0)
    texts, images = (rng.normal(size=(300, 4)).astype(np.float32) for _ in range(2))
    matches = np.stack([np.arange(300)] * 2, axis=1)
    found = [pair_cosines(texts, images, matches, most_wrong=5000, seed=s) for s in (0, 0, 1)]
    assert 4500 < len(found[0].wrong) <= 5000
    np.testing.assert_array_equal(found[0].wrong, found[1].wrong)
    assert not np.array_equal(found[0].wrong[:100], found[2].wrong[:100])
    np.testing.assert_allclose(found[2].correct, (texts * images).sum(axis=1), rtol=1e-5, atol=1e-6)
    every = texts @ images.T
    assert found[0].wrong.mean() == pytest.approx(every[~np.eye(300, dtype=bool)].mean(), abs=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_no_text_matches_in_both_halves(seed):
    rng = np.random.default_rng(seed)
    texts = {
        language: Texts(
            texts=[str(n) for n in range(count)],
            matches=np.stack([rng.integers(0, count, 90), np.arange(90)], axis=1)[
                rng.random(90) < 0.7
            ],
        )
        for language, count in (("zh", 60), ("en", 70))
    }
    halves = halves_of_images(RetrievalPairs(images=[b""] * 90, texts=texts), seed=seed)
    assert 10 < halves.sum() < 80
    for of_language in texts.values():
        for text in range(len(of_language.texts)):
            own = of_language.matches[of_language.matches[:, 0] == text, 1]
            assert len(set(halves[own])) < 2


def test_images_that_one_text_joins_have_no_halves():
    texts = {"en": Texts(texts=["all"], matches=np.array([[0, 0], [0, 1], [0, 2]]))}
    with pytest.raises(DataError, match="the texts join all 3 images into 1 group; expected at"):
        halves_of_images(RetrievalPairs(images=[b""] * 3, texts=texts))


@pytest.mark.parametrize("prior", [0.5, 0.02])
def test_a_calibration_holds_on_pairs_it_was_not_fitted_on(prior):
    embedder, pairs = noisy_case(0)
    plan = CalibrationPlan(prior=prior, precision=0.8)
    calibration, checked = calibrate(embedder, pairs, plan, data={"split": "val"})
    assert (calibration.prior, calibration.dim, calibration.fingerprint) == (prior, 8, "table")
    assert calibration.fitted_on == {
        "split": "val", "languages": ["zh", "en"], "correct_pairs": 240,
        "wrong_pairs": 2 * 59 * 120, "seed": 0,
    }  # fmt: skip
    assert list(checked) == ["zh", "en", "all"]
    assert checked["all"].correct == 240
    assert checked["all"].wrong == checked["zh"].wrong + checked["en"].wrong == 2 * 59 * 120
    assert checked["all"].calibration_error < 0.05
    assert checked["all"].precision == pytest.approx(0.8, abs=0.15)
    assert calibrate(embedder, pairs, plan, data={"split": "val"})[0] == calibration
    assert calibrate(embedder, pairs, replace(plan, seed=1))[0].cosines != calibration.cosines


def test_reliability_equals_a_naive_count():
    rng = np.random.default_rng(2)
    pairs = PairCosines(correct=rng.normal(0.5, 0.2, 50), wrong=rng.normal(0.2, 0.2, 300))
    calibration = Calibration(
        cosines=[-1.0, 0.2, 1.0], probabilities=[0.02, 0.3, 0.99], prior=0.2, threshold=0.4,
        precision=0.9, dim=8, fingerprint="", fitted_on={},
    )  # fmt: skip
    found = reliability(calibration, pairs)
    rows = [(c, 1, 0.2 / 50) for c in pairs.correct] + [(c, 0, 0.8 / 300) for c in pairs.wrong]
    bins = {}
    for cosine, right, weight in rows:
        stated = float(calibration.probability(np.array([cosine]))[0])
        bins.setdefault(int(stated * 15), []).append((stated, right, weight))
    error = 0
    for members in bins.values():
        mass = sum(weight for *_, weight in members)
        confidence = sum(stated * weight for stated, _, weight in members) / mass
        accuracy = sum(right * weight for _, right, weight in members) / mass
        error += mass * abs(confidence - accuracy)
    above = [(right, weight) for cosine, right, weight in rows if cosine >= 0.4]
    hits = sum(right * weight for right, weight in above)
    assert found.calibration_error == pytest.approx(error)
    assert found.precision == pytest.approx(hits / sum(weight for _, weight in above))
    assert found.recall == pytest.approx((pairs.correct >= 0.4).mean())
    nothing = reliability(replace(calibration, threshold=9.0), pairs)
    assert (nothing.precision, nothing.recall) == (0, 0)


def test_a_real_model_is_calibrated(embedder, data_folder):
    pairs = pairs_of_split(of_split(data_folder, "test"), languages=["zh", "en"])
    # A model that has learnt nothing reaches no more than about the prior.
    calibration, checked = calibrate(embedder, pairs, CalibrationPlan(precision=0.3))
    assert calibration.fingerprint == embedder.fingerprint
    assert (calibration.dim, calibration.fitted_on["correct_pairs"]) == (32, 24)
    assert checked["zh"].wrong == 6 * 12 - 12


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prior": 0.0}, r"the prior is 0\.0; expected"),
        ({"precision": 2.0}, r"the precision is 2\.0; expected"),
        ({"precision": 0.0}, r"the precision is 0\.0; expected"),
        ({"prior": float("nan")}, "the prior is nan; expected"),
        ({"most_wrong": 0}, "most_wrong is 0; expected at least 1"),
        ({"seed": -1}, "seed is -1; expected at least 0"),
    ],
    ids=str,
)
def test_a_plan_that_makes_no_sense_is_refused(changes, said):
    with pytest.raises(VlmError, match=said):
        CalibrationPlan(**changes)
