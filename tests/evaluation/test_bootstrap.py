"""Bootstrap intervals: of the right size, by images, paired, and the same again."""

import numpy as np
import pytest

from vlm.errors import VlmError
from vlm.evaluation.bootstrap import interval_of, resampled_means


def bootstrap_interval(values, groups, *, level=0.95, **options):
    return interval_of(resampled_means([values], [groups], **options)[0], level=level)


def test_the_interval_of_single_queries_is_about_that_of_the_normal_distribution():
    values = np.random.default_rng(0).random(4000) < 0.3
    low, high = bootstrap_interval(values, np.arange(4000), resamples=4000)
    error = 1.96 * np.sqrt(0.3 * 0.7 / 4000)
    assert low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    rng, held = np.random.default_rng(1), 0
    for seed in range(200):
        effect = rng.normal(size=60).repeat(5)  # captions of one image are alike
        values = effect + 0.1 * rng.normal(size=300)
        low, high = bootstrap_interval(
            values, np.arange(60).repeat(5), level=0.8, resamples=300, seed=seed
        )
        held += low <= 0 <= high
    assert 0.7 < held / 200 < 0.88


def test_captions_of_one_image_are_drawn_together():
    values, groups = np.array([0.0, 0.0, 0.0, 1.0]), np.array([7, 7, 7, 3])
    means = resampled_means([values], [groups], resamples=500)[0]
    assert set(means.tolist()) == {0.0, 0.25, 1.0}
    assert (means == 0.25).mean() == pytest.approx(0.5, abs=0.1)


def test_resampled_means_are_those_of_the_queries_drawn():
    rng = np.random.default_rng(2)
    groups, values = rng.integers(0, 9, 40), rng.random(40)
    (means,) = resampled_means([values], [groups], resamples=6, seed=11)
    drawn = np.random.default_rng(11).integers(9, size=(6, 9), dtype=np.int32)
    for mean, images in zip(means, drawn, strict=True):
        expected = np.concatenate([values[groups == image] for image in images]).mean()
        assert mean == pytest.approx(expected)


def test_kinds_of_queries_share_their_draws():
    rng = np.random.default_rng(5)
    captions, images = rng.random(60), rng.random(20)
    groups = [np.arange(20).repeat(3), np.arange(20)]
    both = resampled_means([captions, images], groups, resamples=50, seed=3)
    for kind, values in enumerate((captions, images)):
        alone = resampled_means([values], [groups[kind]], resamples=50, seed=3)[0]
        assert both[kind] == pytest.approx(alone)
    # Two captions fewer for one image: its weight in the mean of its kind is a third.
    few = resampled_means([captions[2:], images], [groups[0][2:], groups[1]], resamples=50, seed=3)
    assert few[1] == pytest.approx(both[1])


def test_a_resample_without_queries_of_a_kind_counts_as_all_of_them():
    kinds = [np.array([1.0, 0.0]), np.array([0.25])]
    means = resampled_means(kinds, [np.array([0, 1]), np.array([0])], resamples=200)
    assert set(means[1].tolist()) == {0.25}
    assert set(means[0].tolist()) == {0.0, 0.5, 1.0}


def test_differences_of_two_models_have_a_narrower_interval_than_each_model():
    rng = np.random.default_rng(3)
    hard = rng.random(1000)
    worse, better = (hard < share for share in (0.50, 0.54))
    groups = np.arange(1000) // 5
    low, high = bootstrap_interval(better.astype(float) - worse, groups)
    assert 0 < low < 0.04 < high
    alone = bootstrap_interval(better, groups)
    assert high - low < (alone[1] - alone[0]) / 2


def test_the_seed_decides_and_many_images_are_drawn_in_parts(monkeypatch):
    rng = np.random.default_rng(4)
    values, groups = rng.random(300), np.arange(300) // 2
    first = bootstrap_interval(values, groups)
    assert first == bootstrap_interval(values, groups)
    assert first != bootstrap_interval(values, groups, seed=1)
    monkeypatch.setattr("vlm.evaluation.bootstrap._DRAWS_AT_ONCE", 1000)
    assert bootstrap_interval(values, groups) == first


@pytest.mark.parametrize(
    ("values", "groups", "options", "message"),
    [
        ([], [], {}, "0 values with 0 groups"),
        ([1.0, 2.0], [0], {}, "2 values with 1 groups"),
        ([1.0], [0], {"resamples": 0}, "cannot draw 0 resamples"),
        ([1.0, np.nan], [0, 1], {}, "1 of 2 values are not finite"),
        ([1.0], [0], {"level": 9.5}, "the level of the interval is 9.5"),
    ],
)
def test_what_cannot_be_drawn_is_refused(values, groups, options, message):
    with pytest.raises(VlmError, match=message):
        bootstrap_interval(np.array(values), np.array(groups, np.int64), **options)
