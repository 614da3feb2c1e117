"""What a run trains of its towers, and how it saves memory and time on them."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from vlm.errors import ConfigError
from vlm.models.encoder import Encoder
from vlm.models.locking import lock
from vlm.models.lora import add_lora


@dataclass(frozen=True, kw_only=True)
class AdaptationConfig:
    """Locked towers, low-rank adapters, dropped patches, and activations computed again."""

    lock_image: int | None = None
    """Train only so many last stages of the image tower, 0 for none (LiT); none trains it all."""
    lock_text: int | None = None
    """The same of the text tower."""
    lora_rank: int = 0
    """Rank of the adapters that are trained in the towers' place; 0 for no adapters."""
    lora_alpha: int = 16
    """Scale of the adapters, at least 1; they act with `lora_alpha / lora_rank`."""
    lora_towers: tuple[Literal["image", "text"], ...] = ("image", "text")
    """The towers that have adapters; the other is trained whole, unless it is locked."""
    patch_dropout: float = 0.0
    """Share in [0, 1) of an image's patches that training leaves out (FLIP); not beside masked
    modelling."""
    grad_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""


def adapt(encoder: Encoder, config: AdaptationConfig) -> None:
    """Make an encoder train as configured, in place.

    Raises:
        ConfigError: the encoder has no such stages, layers or patches.
    """
    assert isinstance(encoder, nn.Module)
    if config.lora_rank and not config.lora_towers:
        raise ConfigError("adapt.lora_towers names no tower; expected image, text or both")
    # Asked for when they are needed: not every tower can tell them.
    groups = {"image": encoder.image_groups, "text": encoder.text_groups}
    for side, unlocked in (("image", config.lock_image), ("text", config.lock_text)):
        if unlocked is not None:
            lock(groups[side](), unlocked=unlocked, side=side)
    if config.patch_dropout:
        encoder.set_patch_dropout(config.patch_dropout)
    if config.grad_checkpointing:
        encoder.set_grad_checkpointing(True)
    if config.lora_rank:
        adapted = [group for side in config.lora_towers for group in groups[side]()]
        add_lora(encoder, adapted, rank=config.lora_rank, alpha=config.lora_alpha)
