"""What a model is made of: the configuration of its towers."""

import math
from dataclasses import dataclass, field

from vlm.errors import ConfigError
from vlm.models.multiway_config import MultiwayConfig

MAX_LOGIT_SCALE = 100.0
"""CLIP's bound on the inverse temperature (Radford et al. 2021, section 2.5)."""

MAX_LOG_LOGIT_SCALE = math.log(MAX_LOGIT_SCALE) - 1e-6
"""A little less than its logarithm, whose exponential in float32 would exceed the bound."""


@dataclass(frozen=True, kw_only=True)
class ImageTowerConfig:
    """An image model of timm, and how its features reach the common space."""

    timm_model_name: str = "vit_base_patch16_224"
    """Any name `timm.list_models()` gives."""
    image_size: int = 224
    """Side of the square input, in pixels."""
    timm_model_pretrained: bool = False
    """Start from timm's published weights, which are downloaded."""
    timm_pool: str = "avg"
    """How the tower's last feature map becomes one vector; empty for the model's own way."""
    timm_proj: str = "linear"
    """Projection to `embed_dim`: `linear` or `mlp`."""
    timm_drop: float = 0.0
    """Dropout before the projection, in [0, 1)."""
    timm_drop_path: float | None = None
    """Stochastic depth, in [0, 1), where the model has it."""


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """A causal text transformer; its vocabulary and context come from the tokenizer."""

    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model of images and texts: two towers described here, open_clip's, or M2-Encoder's.

    The fields of two towers have the names and meanings of open_clip's model configs.
    """

    embed_dim: int = 512
    """Width of the common space."""
    vision_cfg: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text_cfg: TextTowerConfig = field(default_factory=TextTowerConfig)
    open_clip: str | None = None
    """A model of open_clip's zoo by its name, in the place of `vision_cfg`, `text_cfg` and
    `embed_dim`; vocabulary and context come from the tokenizer."""
    multiway: MultiwayConfig | None = None
    """M2-Encoder's towers, in the place of those settings."""
    init_logit_scale: float = 1 / 0.07
    """Inverse temperature at the start, in (0, 100]."""
    init_logit_bias: float | None = None
    """Bias of a sigmoid loss's logits at the start, -10 in SigLIP; None for a softmax."""

    def __post_init__(self) -> None:
        if not 0 < self.init_logit_scale <= MAX_LOGIT_SCALE:
            raise ConfigError(
                f"init_logit_scale is {self.init_logit_scale}; expected more than 0, at most 100"
            )
        whole = [name for name in ("open_clip", "multiway") if getattr(self, name) is not None]
        plain = {
            "embed_dim": type(self).embed_dim,
            "vision_cfg": ImageTowerConfig(),
            "text_cfg": TextTowerConfig(),
        }
        parts = [name for name, default in plain.items() if getattr(self, name) != default]
        if len(whole) > 1 or (whole and parts):
            raise ConfigError(
                f"{' and '.join(whole + parts)} describe one model's towers more than once; "
                "expected open_clip, multiway, or settings of the two towers"
            )
