import math
from itertools import pairwise

import pytest

from vlm.errors import ConfigError
from vlm.training.config import ScheduleConfig
from vlm.training.schedule import learning_rate_share


def test_the_rate_rises_in_a_line_then_falls_along_half_a_cosine():
    config = ScheduleConfig(steps=14, warmup_steps=4, final_share=0.2)
    shares = [learning_rate_share(step, config) for step in range(14)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[4] == 1.0
    assert shares[9] == pytest.approx(0.6)
    assert all(after < before for before, after in pairwise(shares[4:]))
    assert shares[-1] == pytest.approx(0.2 + 0.8 * (1 + math.cos(0.9 * math.pi)) / 2)


def test_without_warm_up_the_run_starts_at_the_highest_rate():
    assert learning_rate_share(0, ScheduleConfig(steps=5, warmup_steps=0)) == 1.0


@pytest.mark.parametrize("warmup", [-1, 10, 11])
def test_a_warm_up_that_does_not_fit_is_refused_with_both_numbers(warmup):
    with pytest.raises(ConfigError, match=f"warmup_steps is {warmup} and steps 10"):
        ScheduleConfig(steps=10, warmup_steps=warmup)
