"""The learning rate at the corners of every shape."""

import math
from itertools import pairwise

import pytest

from vlm.errors import ConfigError
from vlm.training.config import ScheduleConfig
from vlm.training.optimization.schedule import learning_rate_factor


def factors(**settings):
    config = ScheduleConfig(**settings)
    return [learning_rate_factor(step, config) for step in range(config.steps)]


def test_the_rate_rises_in_a_line_then_falls_along_half_a_cosine():
    found = factors(steps=14, warmup_steps=4, final_ratio=0.2)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == 1.0
    assert found[9] == pytest.approx(0.6)
    assert all(after < before for before, after in pairwise(found[4:]))
    assert found[-1] == pytest.approx(0.2 + 0.8 * (1 + math.cos(0.9 * math.pi)) / 2)


def test_a_linear_decay_is_a_line_that_would_reach_its_end_after_the_last_step():
    found = factors(steps=14, warmup_steps=4, shape="linear")
    assert found == pytest.approx([0.25, 0.5, 0.75, 1] + [1 - k / 10 for k in range(10)])


def test_a_linear_decay_ends_at_the_final_ratio():
    found = factors(steps=10, warmup_steps=0, shape="linear", final_ratio=0.5)
    assert found == pytest.approx([1 - 0.05 * k for k in range(10)])


def test_wsd_stays_at_the_highest_rate_until_its_decay():
    found = factors(steps=20, warmup_steps=2, shape="wsd", decay_steps=4)
    assert found[:2] == [0.5, 1.0]
    assert found[2:17] == [1.0] * 15  # the decay begins at the highest rate
    assert found[17:] == pytest.approx([1 - math.sqrt(k / 4) for k in (1, 2, 3)])


def test_wsd_decays_over_a_fifth_of_the_steps_by_default():
    assert factors(steps=20, warmup_steps=2, shape="wsd") == factors(
        steps=20, warmup_steps=2, shape="wsd", decay_steps=4
    )
    assert factors(steps=20, warmup_steps=18, shape="wsd") == factors(
        steps=20, warmup_steps=18, shape="wsd", decay_steps=2
    )


def test_without_warm_up_the_run_starts_at_the_highest_rate():
    assert learning_rate_factor(0, ScheduleConfig(steps=5, warmup_steps=0)) == 1.0


@pytest.mark.parametrize("warmup", [-1, 10, 11])
def test_a_warm_up_that_does_not_fit_is_refused_with_both_numbers(warmup):
    with pytest.raises(ConfigError, match=f"warmup_steps is {warmup} in a schedule or stage of 10"):
        ScheduleConfig(steps=10, warmup_steps=warmup)


@pytest.mark.parametrize("steps", [-3, 0])
def test_a_run_without_steps_is_refused(steps):
    with pytest.raises(ConfigError, match=f"steps is {steps}; expected at least 1"):
        ScheduleConfig(steps=steps)


@pytest.mark.parametrize("decay", [0, 9])
def test_a_decay_that_does_not_fit_is_refused(decay):
    with pytest.raises(ConfigError, match=f"decay_steps is {decay}; expected 1 to 8, the steps"):
        ScheduleConfig(steps=10, warmup_steps=2, decay_steps=decay)


def test_a_final_ratio_out_of_range_is_refused():
    with pytest.raises(ConfigError, match=r"final_ratio is 1\.5; expected 0 to 1"):
        ScheduleConfig(final_ratio=1.5)
