"""The learning rate as a pure function of the step."""

import math

from vlm.training.optimization.config import ScheduleConfig


def learning_rate_factor(step: int, config: ScheduleConfig) -> float:
    """Return the ratio of the highest learning rate for a step in [0, steps).

    With x from 0 to 1 over the decay, what is left of the way down to `final_ratio` is half a
    cosine (Loshchilov and Hutter 2017, equation 5), the line 1 - x, with which Bergsma et al. 2025
    ("Straight to Zero") decay to 0, or for `wsd` 1 - sqrt(x), the best of those that Haegele
    et al. 2024 compare; the rate that stays the same before it is MiniCPM's (Hu et al. 2024,
    section 4).
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    after_warmup = config.steps - config.warmup_steps
    decay_steps = after_warmup
    if config.shape == "wsd":
        decay_steps = config.decay_steps or min(after_warmup, -(-config.steps // 5))
    x = max(step - (config.steps - decay_steps), 0) / decay_steps
    left = {"cosine": (1 + math.cos(math.pi * x)) / 2, "linear": 1 - x, "wsd": 1 - math.sqrt(x)}
    return config.final_ratio + (1 - config.final_ratio) * left[config.shape]
