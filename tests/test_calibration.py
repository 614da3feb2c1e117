"""A calibration is stored in a bundle, read back, and answers with probabilities."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from tests.builders import THINGS, encoded, make_image, tiny_bundle
from vlm.bundle import load_bundle, store_calibration
from vlm.calibration import Calibration, calibration_from_record
from vlm.embedding.embedder import Embedder
from vlm.errors import CheckpointError, VlmError

MAP = Calibration(
    cosines=(-0.5, 0.1, 0.1, 0.5),
    probabilities=(0.01, 0.2, 0.4, 0.9),
    prior=0.5,
    threshold=0.3,
    precision=0.9,
    dim=32,
    fingerprint="f",
    fitted_on={"data": "here", "split": "val"},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture
def calibrated(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "bundle")
    store_calibration(copy, replace(MAP, fingerprint=load_bundle(copy).fingerprint))
    return copy


def test_the_map_is_linear_between_knots_and_constant_beyond():
    cosines = np.array([[-1, -0.5, -0.2], [0.3, 0.5, 1]])
    expected = [[0.01, 0.01, 0.105], [0.65, 0.9, 0.9]]
    np.testing.assert_allclose(MAP.probability(cosines), expected)
    assert MAP.probability(cosines.astype(np.float32)).dtype == np.float32


@pytest.mark.parametrize("prior", [0.01, 0.5, 0.9])
def test_another_prior_follows_bayes_rule(prior):
    cosines = np.linspace(-1, 1, 50)
    fitted = MAP.probability(cosines)
    asked = MAP.probability(cosines, prior=prior)
    likelihood_ratio = fitted / (1 - fitted) / (MAP.prior / (1 - MAP.prior))
    np.testing.assert_allclose(asked / (1 - asked), likelihood_ratio * prior / (1 - prior))


@pytest.mark.parametrize("prior", [0.0, 1.0, -0.2, 2.0, float("nan")])
def test_a_prior_that_is_no_share_is_refused(prior):
    with pytest.raises(VlmError, match=r"the prior is .*; expected a ratio between 0 and 1"):
        MAP.probability(np.zeros(1), prior=prior)


@pytest.mark.parametrize(
    "changes",
    [
        {"cosines": (0.0, -0.5, 0.1, 0.5)},
        {"cosines": (0.1, 0.5)},
        {"cosines": (), "probabilities": ()},
        {"probabilities": (0.01, 0.2, 0.1, 0.9)},
        {"probabilities": (0.0, 0.2, 0.4, 0.9)},
        {"probabilities": (0.1, 0.2, 0.4, 1.0)},
        {"cosines": (-0.5, 0.1, float("nan"), 0.5)},
        {"prior": 1.0},
    ],
    ids=str,
)
def test_knots_that_are_no_map_are_refused(changes):
    with pytest.raises(VlmError, match="expected as many of each, rising, and probabilities"):
        replace(MAP, **changes)


def test_a_record_gives_the_same_calibration():
    record = json.loads(json.dumps(MAP.record()))
    assert calibration_from_record(record).record() == record


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([], r"unexpected keys in calibration: \[\]; expected \["),
        ({"prior": 0.5}, r"unexpected keys in calibration: \['prior'\]; expected \["),
        (MAP.record() | {"more": 1}, "'more'"),
        (MAP.record() | {"cosines": ["a", "b", "c", "d"]}, "something else than numbers"),
        (MAP.record() | {"prior": "half"}, "something else than numbers"),
        (MAP.record() | {"dim": None}, "something else than numbers"),
    ],
    ids=["list", "part", "more", "letters", "word", "none"],
)
def test_what_is_no_record_is_refused(record, said):
    with pytest.raises(VlmError, match=said):
        calibration_from_record(record)


def test_a_bundle_keeps_its_calibration(calibrated, folder):
    bundle = load_bundle(calibrated)
    assert bundle.calibration.record() == replace(MAP, fingerprint=bundle.fingerprint).record() | {
        "cosines": list(MAP.cosines), "probabilities": list(MAP.probabilities),
    }  # fmt: skip
    assert load_bundle(folder).calibration is None
    # Nothing else has changed, and a second calibration replaces the first.
    before = json.loads((folder / "vlm.json").read_text())
    after = json.loads((calibrated / "vlm.json").read_text())
    assert after.pop("calibration")["threshold"] == 0.3
    assert after == before
    store_calibration(calibrated, replace(bundle.calibration, threshold=0.4))
    assert load_bundle(calibrated).calibration.threshold == 0.4


def test_a_calibration_of_other_weights_is_refused(calibrated, tmp_path):
    with pytest.raises(CheckpointError, match=r"is of another model \(f\) than its own \("):
        store_calibration(calibrated, MAP)
    other = tiny_bundle(tmp_path / "other", seed=1)
    shutil.copy(calibrated / "vlm.json", other / "vlm.json")
    with pytest.raises(CheckpointError, match=r"the calibration of .*other is of another model"):
        load_bundle(other)


def test_a_damaged_calibration_is_refused(calibrated):
    path = calibrated / "vlm.json"
    record = json.loads(path.read_text())
    record["calibration"]["cosines"].reverse()
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"cannot read .*vlm\.json: a calibration has 4 cos"):
        load_bundle(calibrated)


def test_what_is_no_bundle_takes_no_calibration(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a bundle: it has no vlm\.json"):
        store_calibration(tmp_path, MAP)


def test_match_probability_is_the_map_of_the_cosines(calibrated):
    embedder = Embedder.load(calibrated, device="cpu")
    texts = embedder.encode_text([en for en, _ in THINGS])
    images = embedder.encode_image([encoded(make_image(number)) for number in range(5)])
    found = embedder.match_probability(texts, images)
    assert found.shape == (12, 5)
    assert found.dtype == np.float32
    assert ((found >= 0) & (found <= 1)).all()
    np.testing.assert_allclose(found, MAP.probability(texts @ images.T))
    rare = embedder.match_probability(texts, images, prior=0.001)
    np.testing.assert_allclose(rare, MAP.probability(texts @ images.T, prior=0.001))
    np.testing.assert_allclose(embedder.match_probability(images, texts), found.T, atol=1e-6)


def test_a_bundle_that_is_not_calibrated_gives_no_probability(folder):
    embedder = Embedder.load(folder, device="cpu")
    texts = embedder.encode_text(["cat"])
    with pytest.raises(VlmError, match="the bundle is not calibrated; `vlm eval calibrate BUNDLE`"):
        embedder.match_probability(texts, texts)


def test_vectors_of_another_width_have_no_probability(calibrated):
    bundle = load_bundle(calibrated)
    embedder = Embedder(replace(bundle, truncate_dims=(8,)), truncate_dim=8)
    texts = embedder.encode_text(["cat"])
    with pytest.raises(VlmError, match="calibrated for vectors of 32 numbers, not of 8; calibrate"):
        embedder.match_probability(texts, texts)
