"""What a run trains of its towers, and how it saves memory and time on them."""

from vlm.errors import ConfigError
from vlm.models.encoder import Encoder
from vlm.models.locking import lock
from vlm.models.lora import add_lora
from vlm.training.config import AdaptationConfig


def adapt(encoder: Encoder, config: AdaptationConfig) -> None:
    """Make an encoder train as configured, in place.

    Raises:
        ConfigError: the encoder has no such stages, layers or patches.
    """
    if config.lora_rank and not config.lora_towers:
        raise ConfigError("adapt.lora_towers names no tower; expected image, text or both")
    # Methods, called only when needed: not every tower can be divided into groups.
    groups = {"image": encoder.image_groups, "text": encoder.text_groups}
    for side, unlocked in (
        ("image", config.image_unlocked_groups),
        ("text", config.text_unlocked_groups),
    ):
        if unlocked is not None:
            lock(groups[side](), unlocked=unlocked, side=side)
    if config.patch_dropout:
        encoder.set_patch_dropout(config.patch_dropout)
    if config.grad_checkpointing:
        encoder.set_grad_checkpointing(True)
    if config.lora_rank:
        adapted = [group for side in config.lora_towers for group in groups[side]()]
        add_lora(encoder, adapted, rank=config.lora_rank, alpha=config.lora_alpha)
