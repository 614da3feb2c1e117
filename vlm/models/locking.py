"""Locked towers: parameters that stay as they are, and batch norms that keep their statistics."""

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlm.errors import ConfigError
from vlm.models.batch_norm import GroupBatchNorm2d


def lock(groups: Sequence[Sequence[nn.Parameter]], *, unlocked: int, side: str) -> None:
    """Keep a tower as it is, but for its last stages (LiT, Zhai et al. 2022, section 3).

    Args:
        groups: The tower's parameters from the input to the output, a list a stage.
        unlocked: How many of the last stages are trained; 0 locks the whole tower.
        side: Its name, for the error.

    Raises:
        ConfigError: the tower has fewer stages, or `unlocked` is negative.
    """
    if not 0 <= unlocked < len(groups):
        raise ConfigError(
            f"adapt.{side}_unlocked_groups is {unlocked}; expected 0 to {len(groups) - 1}, or null "
            f"for all {len(groups)} stages of the tower"
        )
    for group in groups[: len(groups) - unlocked]:
        for parameter in group:
            parameter.requires_grad_(False)


def keep_locked_statistics(model: nn.Module) -> None:
    """Put batch norms whose parameters are locked into evaluation mode.

    Their running statistics belong to the locked weights; call it after `model.train()`.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm | GroupBatchNorm2d) and not any(
            parameter.requires_grad for parameter in module.parameters()
        ):
            module.eval()
