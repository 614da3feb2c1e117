"""What a run trains of its towers, and how it saves memory and time on them."""

from collections.abc import Sequence

from torch import nn

from vlm.errors import ConfigError
from vlm.models.blocks import recompute
from vlm.models.encoder import Encoder
from vlm.models.lora import add_lora
from vlm.training.config import AdaptationConfig


def adapt(encoder: Encoder, config: AdaptationConfig) -> None:
    """Make an encoder train as configured, in place.

    Raises:
        ConfigError: the encoder has no such stages, layers, blocks or patches.
    """
    if config.lora_rank and not config.lora_towers:
        raise ConfigError("adapt.lora_towers names no tower; expected image, text or both")
    # Methods, called only when needed: not every tower can be divided into groups.
    groups = {"image": encoder.image_groups, "text": encoder.text_groups}
    unlocked = {"image": config.image_unlocked_groups, "text": config.text_unlocked_groups}
    for side, number in unlocked.items():
        if number is not None:
            lock(groups[side](), unlocked=number, side=side)
    if config.patch_dropout:
        encoder.set_patch_dropout(config.patch_dropout)
    if config.grad_checkpointing != "none":
        recompute(
            blocks_of(encoder)[:: config.grad_checkpointing_every],
            keep_products=config.grad_checkpointing == "selective",
        )
    if config.lora_rank:
        adapted = [group for side in config.lora_towers for group in groups[side]()]
        add_lora(encoder, adapted, rank=config.lora_rank, alpha=config.lora_alpha)


def blocks_of(encoder: Encoder) -> list[nn.Module]:
    """Return the blocks of an encoder's towers; a `ConfigError` if it has none."""
    blocks = encoder.blocks()
    if not blocks:
        raise ConfigError(
            "the towers have no blocks to compute again or to compile; expected "
            "adapt.grad_checkpointing none and compile false"
        )
    return blocks


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
