"""The learning rate as a pure function of the step."""

import math
from dataclasses import dataclass

from vlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then half a cosine (Loshchilov and Hutter 2017)."""

    steps: int = 1000
    """Length of the run, in optimizer steps."""
    warmup_steps: int = 100
    """Steps over which the rate rises to its highest."""
    final_share: float = 0.0
    """Share of the highest rate that is left at the end, in [0, 1]."""
    new_rows_steps: int = 0
    """Steps at the start in which only the embedding's rows of new pieces are trained, where the
    run starts from a bundle with a grown vocabulary."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps < self.steps:
            raise ConfigError(
                f"schedule: warmup_steps is {self.warmup_steps} and steps {self.steps}; "
                "expected 0 <= warmup_steps < steps"
            )
        if not 0 <= self.new_rows_steps < self.steps:
            raise ConfigError(
                f"schedule: new_rows_steps is {self.new_rows_steps} and steps {self.steps}; "
                "expected 0 <= new_rows_steps < steps"
            )


def learning_rate_share(step: int, config: ScheduleConfig) -> float:
    """Return the share of the highest learning rate for a step in [0, steps)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.final_share + (1 - config.final_share) * cosine
