"""AdamW with decay on matrices only, and its learning rate as a pure function of the step."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from vlm.training.config import OptimizerConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return the optimizer of every parameter that takes part in training."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
    )


def skip_when_not_finite(optimizer: torch.optim.Optimizer, gradient_norm: Tensor) -> None:
    """Have the device skip the next update, and all later ones, if the norm is not finite.

    Weights, moments and step counts stay as they are. The host need not know to go on: fused
    optimizers read `found_inf` in their kernel, which is how gradient scalers skip a step as well.
    """
    fused: Any = getattr(optimizer, "optimizer", optimizer)  # within accelerate's wrapper
    wrong = (~gradient_norm.isfinite()).float()
    before = getattr(fused, "found_inf", None)
    fused.found_inf = wrong if before is None else torch.maximum(before, wrong)


def learning_rate_factor(step: int, config: ScheduleConfig) -> float:
    """Return the ratio of the highest learning rate for a step in [0, steps)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.final_ratio + (1 - config.final_ratio) * cosine
