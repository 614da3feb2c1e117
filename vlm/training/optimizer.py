"""Optimizers, and the rate and decay of every parameter."""

from collections import defaultdict
from typing import Any, cast

import torch
from timm.optim.lion import Lion
from torch import nn

from vlm.models.pretraining import PretrainingModel
from vlm.training.config import OptimizerConfig, TowerRateConfig

RATE_RATIO = "learning_rate_ratio"
"""Key of a parameter group: the ratio of its learning rate to that of the run."""


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer of every parameter that takes part in training.

    `model` is a `PretrainingModel`, or any other module where no tower has settings of its own.
    """
    groups, rate, betas = parameter_groups(model, config), config.learning_rate, config.betas
    if config.name == "lion":
        return Lion(groups, lr=rate, betas=betas)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=config.eps, fused=True)


def reads_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether a step reads `found_inf` on the device and then changes nothing.

    torch's fused optimizers do; before a step of any other, the host has to look.
    """
    plain = getattr(optimizer, "optimizer", optimizer)  # within accelerate's wrapper
    return bool(getattr(plain, "_step_supports_amp_scaling", False))


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Divide what is trained by rate and decay.

    Gains, biases and the temperature do not decay. Towers follow their own settings, as SigLIP's
    pretrained ones do (Zhai et al. 2023, figure 4); all else, such as the temperature and the parts
    that only training has, has the model's. With `layer_decay` the rate of a stage that lies d
    stages before the last is multiplied by its d-th power (BEiT: Bao et al. 2022).
    """
    own = _tower_settings(model, config)
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.requires_grad:
            ratio, decay = own.get(parameter, (1.0, config.weight_decay))
            groups[ratio, decay if parameter.ndim >= 2 else 0.0].append(parameter)
    return [
        {"params": parameters, RATE_RATIO: ratio, "weight_decay": decay}
        for (ratio, decay), parameters in groups.items()
    ]


def _tower_settings(
    model: nn.Module, config: OptimizerConfig
) -> dict[nn.Parameter, tuple[float, float]]:
    """Return the ratio of the rate and the decay of parameters that a tower's settings name."""
    settings: dict[nn.Parameter, tuple[float, float]] = {}
    for side, tower in (("image", config.image), ("text", config.text)):
        if tower == TowerRateConfig():
            continue  # and is not asked for its stages, which not every tower has
        encoder = cast(PretrainingModel, model).encoder
        stages = encoder.image_groups() if side == "image" else encoder.text_groups()
        decay = config.weight_decay if tower.weight_decay is None else tower.weight_decay
        for depth, stage in enumerate(reversed(stages)):
            ratio = tower.learning_rate_ratio * tower.layer_decay**depth
            for parameter in stage:
                before = settings.get(parameter, (ratio, decay))
                settings[parameter] = (min(before[0], ratio), min(before[1], decay))
    return settings
