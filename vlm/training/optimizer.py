"""AdamW with decay on matrices only."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019)."""

    learning_rate: float = 1e-3
    """The highest rate, reached after warm-up."""
    weight_decay: float = 0.1
    """Decay of matrices and kernels; gains, biases and the temperature are left alone."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    max_gradient_norm: float = 1.0
    """Gradients whose norm is larger are scaled down to it."""


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
