"""What a model is made of: the configuration of its towers."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlm.errors import ConfigError
from vlm.models.multiway_config import MultiwayConfig

MAX_LOGIT_SCALE = 100.0
"""CLIP's bound on the inverse temperature (Radford et al. 2021, section 2.5)."""

MAX_LOG_LOGIT_SCALE = math.log(MAX_LOGIT_SCALE) - 1e-6
"""A little less than its logarithm, whose exponential in float32 would exceed the bound."""

CMLM = "cmlm"
"""Name of the loss of masked words."""

CMIM = "cmim"
"""Name of the loss of hidden patches."""

RowInit = Literal["random", "mean", "lexicon", "similarity"]

PositionGrowth = Literal["append", "interpolate", "keep-head-stretch-tail"]
"""How the positions of a longer context come from the old ones; see `grow_positions`."""


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
    """How the tower's last feature map becomes one vector: `avg`, `max` and others of timm's, or
    `flatten`, which keeps where in the image something is, and which open_clip cannot load. Empty
    for the model's own way."""
    timm_proj: str = "linear"
    """Projection to `embed_dim`: `linear` or `mlp`."""
    timm_drop: float = 0.0
    """Dropout before the projection, in [0, 1)."""
    timm_drop_path: float | None = None
    """Stochastic depth, in [0, 1), where the model has it."""
    timm_output_stride: int | None = None
    """Pixels of the image between two places of the last map, where the model leaves a choice:
    often 8, 16 or 32. Less is a finer map, which open_clip cannot load. Null for its own."""


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """A causal text transformer, or a bag of tokens.

    Its vocabulary and context come from the tokenizer.
    """

    width: int = 512
    heads: int = 8
    layers: int = 12
    """0 for the mean of the tokens' embeddings, which knows words and not their order, and which
    open_clip cannot load; heads and mlp_ratio have no meaning then."""
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise ConfigError(f"text_cfg.layers is {self.layers}; expected at least 0")


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


@dataclass(frozen=True, kw_only=True)
class MaskedConfig:
    """What masked modelling hides, how it is predicted, and the weights of its losses."""

    cmlm_weight: float = 0.0
    """Weight of masked words, M2-Encoder's beta, at least 0; 0 switches them off."""
    cmim_weight: float = 0.0
    """Weight of hidden patches, M2-Encoder's alpha, at least 0; 0 switches them off."""
    text_ratio: float = 0.5
    """Ratio in (0, 1] of a text's tokens to mask, whole words; `mvlm_prob` in M2-Encoder's code."""
    image_ratio: float = 0.4
    """Ratio in (0, 1) of an image's patches to hide; M2-Encoder's code has 80 of 196."""
    decoder_layers: int = 2
    """Layers of each decoder, at least 1."""
    decoder_width: int | None = None
    """Width of both decoders; null for that of the states they read."""
    decoder_heads: int | None = None
    """Attention heads, a divisor of the width; null for one per 64 dimensions."""
    teacher: Path | None = None
    """Bundle whose image tower gives the targets of hidden patches; null for their pixels."""

    def __post_init__(self) -> None:
        for name in ("cmlm_weight", "cmim_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 0")
        if not 0 < self.text_ratio <= 1:
            raise ConfigError(f"text_ratio is {self.text_ratio}; expected more than 0, at most 1")
        if not 0 < self.image_ratio < 1:
            raise ConfigError(
                f"image_ratio is {self.image_ratio}; expected more than 0, less than 1"
            )
        for name in ("decoder_layers", "decoder_width", "decoder_heads"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"{name} is {number}; expected at least 1")

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the losses that are on, by their names."""
        weights = {CMLM: self.cmlm_weight, CMIM: self.cmim_weight}
        return {name: weight for name, weight in weights.items() if weight > 0}


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """How a model comes by the rows of new pieces and the positions of a longer context."""

    init: RowInit = "lexicon"
    """`random`: drawn like the old rows. `mean`: the mean of the pieces that a new one was split
    into. `lexicon`: the mean of its English translations' pieces. `similarity`: the mean of the
    old rows that are nearest in another space of vectors. A piece that the lexicon or the vectors
    do not have starts as by `mean`."""
    lexicon: Path | None = None
    """For `lexicon`: a file with a word, a tab and a translation per line; null is CC-CEDICT."""
    vectors: tuple[Path, ...] = ()
    """For `similarity`: files of word vectors in one space for both languages."""
    neighbours: int | None = 10
    """For `similarity`: number of old rows to average; null averages all (CLP-Transfer)."""
    temperature: float = 0.1
    """For `similarity`: more than 0; the smaller, the more the nearest row prevails."""
    rank: int | None = None
    """For `similarity`: rank of the embedding to average in (OFA); null uses all dimensions."""
    positions: int | None = None
    """Longest text in tokens of the grown model; null is the tokenizer's context length."""
    how: PositionGrowth = "append"
    """Where new positions come from; only `append` leaves every old text's feature as it was."""
    seed: int = 0
    """Decides what is drawn."""
