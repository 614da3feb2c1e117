"""The isotonic map is the best rising one, and holds at the prior that was asked for."""

import numpy as np
import pytest

from vlm.errors import VlmError
from vlm.evaluation.calibration import PairCosines, fit_map, threshold_for


def best_rising_values(x, y, weight):
    """Return the isotonic fit by its max-min formula: of all means of stretches around a point."""
    places = np.unique(x)
    masses = np.array([weight[x == place].sum() for place in places])
    sums = np.array([(weight * y)[x == place].sum() for place in places])

    def mean(first, last):
        return sums[first : last + 1].sum() / masses[first : last + 1].sum()

    count = len(places)
    values = [
        max(min(mean(a, b) for b in range(i, count)) for a in range(i + 1)) for i in range(count)
    ]
    return np.array([values[np.searchsorted(places, place)] for place in x])


@pytest.mark.parametrize("digits", [1, 6], ids=["many ties", "few ties"])
@pytest.mark.parametrize("seed", range(6))
def test_the_map_equals_the_max_min_formula(seed, digits):
    rng = np.random.default_rng(seed)
    pairs = PairCosines(
        # Mixed at both ends, where steps of one kind alone would count half a pair of the other.
        correct=np.concatenate([[0.0, 1.0], rng.random(15).round(digits)]),
        wrong=np.concatenate([[0.0, 1.0], rng.random(30).round(digits) ** 2]),
    )
    x, is_correct, weight = pairs.weighted(0.4)
    knots, values = fit_map(pairs, prior=0.4)
    assert (np.diff(knots) >= 0).all()
    np.testing.assert_allclose(
        np.interp(x, knots, values), best_rising_values(x, is_correct, weight), atol=1e-12
    )


def test_pairs_of_one_cosine_share_a_step():
    knots, values = fit_map(PairCosines(correct=np.full(2, 0.5), wrong=np.array([0.5])), prior=0.4)
    assert (knots.tolist(), values.tolist()) == ([0.5, 0.5], pytest.approx([0.4, 0.4]))


@pytest.mark.parametrize("prior", [0.5, 0.05])
def test_the_map_finds_the_true_probabilities(prior):
    rng = np.random.default_rng(0)
    pairs = PairCosines(correct=rng.normal(0.6, 0.1, 20_000), wrong=rng.normal(0.3, 0.1, 200_000))
    knots, values = fit_map(pairs, prior=prior)
    asked = np.linspace(0.3, 0.7, 41)
    found = np.interp(asked, knots, values)
    odds = np.exp((asked - 0.45) * 0.3 / 0.01) * prior / (1 - prior)  # of two normal densities
    np.testing.assert_allclose(found, odds / (1 + odds), atol=0.06)
    assert np.abs(found - odds / (1 + odds)).mean() < 0.01


@pytest.mark.parametrize("prior", [0.5, 0.1])
def test_the_mean_probability_of_the_pairs_is_the_prior(prior):
    rng = np.random.default_rng(1)
    pairs = PairCosines(correct=rng.normal(0.5, 0.1, 300), wrong=rng.normal(0.3, 0.1, 5000))
    knots, values = fit_map(pairs, prior=prior)
    mean = [np.interp(cosines, knots, values).mean() for cosines in (pairs.correct, pairs.wrong)]
    # But for the half pairs at both ends.
    assert prior * mean[0] + (1 - prior) * mean[1] == pytest.approx(prior, abs=0.01)


def test_nothing_is_certain():
    pairs = PairCosines(correct=np.array([0.8, 0.9]), wrong=np.array([0.1, 0.2, 0.3]))
    knots, values = fit_map(pairs, prior=0.5)
    assert knots.tolist() == [0.1, 0.3, 0.8, 0.9]
    # Three wrong pairs of a sixth each and half a right one of a quarter; the reverse above.
    below, above = 0.125 / (0.5 + 0.125), 0.5 / (0.5 + 1 / 12)
    np.testing.assert_allclose(values, [below, below, above, above])


def test_the_half_pairs_keep_the_map_rising():
    # One right pair on top of a step that is nearly all right.
    right = np.concatenate([np.linspace(0.5, 0.6, 999), [0.9]])
    pairs = PairCosines(correct=right, wrong=np.array([0.0, 0.55, 0.61]))
    _, values = fit_map(pairs, prior=0.99)
    assert (np.diff(values) >= 0).all()
    assert 0 < values[0] < values[-1] < 1


def test_one_step_is_the_prior():
    knots, values = fit_map(PairCosines(correct=np.array([0.1]), wrong=np.array([0.5])), prior=0.3)
    assert knots.tolist() == [0.1, 0.5]
    np.testing.assert_allclose(values, 0.3)


def brute_force_threshold(pairs, prior, precision):
    for cosine in sorted({*pairs.correct.tolist(), *pairs.wrong.tolist()}):
        right = prior * np.mean(pairs.correct >= cosine)
        wrong = (1 - prior) * np.mean(pairs.wrong >= cosine)
        if right >= precision * (right + wrong) - 1e-9:
            return cosine
    return None


@pytest.mark.parametrize("levels", [10, 10_000], ids=["many ties", "few ties"])
@pytest.mark.parametrize("precision", [0.3, 0.8, 0.95])
@pytest.mark.parametrize("seed", range(4))
def test_the_threshold_is_the_lowest_with_the_precision(seed, precision, levels):
    rng = np.random.default_rng(seed)
    pairs = PairCosines(
        correct=np.append(rng.normal(0.6, 0.1, 50), 1.5).round(int(np.log10(levels))),
        wrong=rng.normal(0.4, 0.1, 400).round(int(np.log10(levels))),
    )
    found = threshold_for(pairs, prior=0.2, precision=precision)
    assert found == brute_force_threshold(pairs, 0.2, precision)


def test_a_precision_out_of_reach_is_refused():
    pairs = PairCosines(correct=np.array([0.1, 0.5]), wrong=np.array([0.2, 0.9]))
    with pytest.raises(VlmError, match=r"precision 0\.9 at the prior 0\.5; the best .* is 0\.5"):
        threshold_for(pairs, prior=0.5, precision=0.9)


@pytest.mark.parametrize("precision", [0.0, -1.0, 1.5, float("nan")])
def test_a_precision_out_of_range_is_refused(precision):
    pairs = PairCosines(correct=np.array([0.5]), wrong=np.array([0.2]))
    with pytest.raises(VlmError, match=r"the precision is .*; expected a number above 0"):
        threshold_for(pairs, prior=0.5, precision=precision)


@pytest.mark.parametrize("prior", [0.0, 1.0, float("nan")])
def test_a_prior_out_of_range_is_refused(prior):
    with pytest.raises(VlmError, match=r"the prior is .*; expected a number between 0 and 1"):
        fit_map(PairCosines(correct=np.array([0.5]), wrong=np.array([0.2])), prior=prior)


@pytest.mark.parametrize(("right", "wrong"), [(0, 3), (3, 0)])
def test_pairs_of_one_kind_are_refused(right, wrong):
    pairs = PairCosines(correct=np.zeros(right), wrong=np.zeros(wrong))
    with pytest.raises(VlmError, match=f"found {right} correct and {wrong} wrong pairs; exp"):
        fit_map(pairs, prior=0.5)
