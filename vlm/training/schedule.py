"""The learning rate as a pure function of the step."""

import math

from vlm.training.config import ScheduleConfig


def learning_rate_factor(step: int, config: ScheduleConfig) -> float:
    """Return the ratio of the highest learning rate for a step in [0, steps)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.final_ratio + (1 - config.final_ratio) * cosine
