"""The dual encoder: an image tower, a text tower, projections to one space, and a temperature."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import open_clip
import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models.text_tower import check_text_tower, encode_tokens
from vlm.text.tokenizer import TokenBatch, Tokenizer

MAX_LOGIT_SCALE = 100.0
"""CLIP's bound on the inverse temperature (Radford et al. 2021, section 2.5)."""

# A little less than the logarithm, whose exponential in float32 would exceed the bound.
_MAX_LOG_LOGIT_SCALE = math.log(MAX_LOGIT_SCALE) - 1e-6


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
    """A dual encoder; the fields have the names and meanings of open_clip's model configs."""

    embed_dim: int = 512
    """Width of the common space."""
    vision_cfg: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text_cfg: TextTowerConfig = field(default_factory=TextTowerConfig)
    init_logit_scale: float = 1 / 0.07
    """Inverse temperature at the start, in (0, 100]."""
    init_logit_bias: float | None = None
    """Bias of a sigmoid loss's logits at the start, -10 in SigLIP; None for a softmax."""

    def __post_init__(self) -> None:
        if not 0 < self.init_logit_scale <= MAX_LOGIT_SCALE:
            raise ConfigError(
                f"init_logit_scale is {self.init_logit_scale}; expected more than 0, at most 100"
            )


class Features(NamedTuple):
    """What a training step needs of a batch."""

    image: Float[Tensor, "batch dim"] | None
    """Unit vectors, float32; None where no pictures were given."""
    text: dict[str, Float[Tensor, "batch dim"]]
    """Unit vectors by language, float32."""
    logit_scale: Float[Tensor, ""]
    """The inverse temperature, at most `MAX_LOGIT_SCALE`."""
    logit_bias: Float[Tensor, ""] | None
    """The bias of a sigmoid loss's logits, where the model has one."""
    sent: Any = None
    """What the receiver of the text features has returned."""


class DualEncoder(nn.Module):
    """Two towers that map pictures and texts to unit vectors of one space.

    Args:
        visual: Maps normalised pictures to `embed_dim` features.
        text: A transformer that `encode_tokens` can run.
        init_logit_scale: Inverse temperature at the start.
        init_logit_bias: Bias of a sigmoid loss's logits at the start; None for no bias.
    """

    def __init__(
        self,
        visual: nn.Module,
        text: TextTransformer,
        *,
        init_logit_scale: float,
        init_logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        self.visual = visual.to(memory_format=torch.channels_last)
        self.text = text
        self.embed_dim = int(text.text_projection.shape[1])
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))
        self.logit_bias = (
            None if init_logit_bias is None else nn.Parameter(torch.tensor(init_logit_bias))
        )
        self.clamp_logit_scale()

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """The inverse temperature."""
        return self.log_logit_scale.exp()

    def encode_image(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch dim"]:
        """Return a float32 unit vector for each picture."""
        # Convolutions run up to half as fast again with the channels innermost.
        images = images.contiguous(memory_format=torch.channels_last)
        return F.normalize(self.visual(images).float(), dim=-1)

    def encode_text(self, tokens: TokenBatch) -> Float[Tensor, "batch dim"]:
        """Return a float32 unit vector for each text."""
        return F.normalize(encode_tokens(self.text, tokens).float(), dim=-1)

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"] | None,
        texts: Mapping[str, TokenBatch],
        on_texts: Callable[[Mapping[str, Tensor]], Any] | None = None,
    ) -> Features:
        """Encode a batch's captions in every language, then its pictures.

        Args:
            images: Normalised pictures, or None.
            texts: Captions by language; none at all is possible.
            on_texts: Called with the text features before the pictures are encoded, so that
                they can travel meanwhile; the result carries what it returns.
        """
        text = {language: self.encode_text(tokens) for language, tokens in texts.items()}
        sent = None if on_texts is None else on_texts(text)
        return Features(
            image=None if images is None else self.encode_image(images),
            text=text,
            logit_scale=self.logit_scale,
            # Not the parameter itself, which wrappers of the module may not see leave it.
            logit_bias=None if self.logit_bias is None else self.logit_bias * 1,
            sent=sent,
        )

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Bring the temperature back into its bound; called after every optimizer step.

        Bounding the stored parameter, not the scale in the forward pass, leaves the scale its
        gradient at the bound.
        """
        self.log_logit_scale.clamp_(max=_MAX_LOG_LOGIT_SCALE)


def build_dual_encoder(config: ModelConfig, tokenizer: Tokenizer) -> DualEncoder:
    """Build an untrained dual encoder that reads `tokenizer`'s ids.

    Raises:
        ConfigError: timm has no such model, or the towers cannot be built as configured.
    """
    return _from_open_clip(
        open_clip_model_config(config, tokenizer), config.init_logit_scale, config.init_logit_bias
    )


def open_clip_model_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `model_cfg` with which open_clip builds the same model."""
    text_cfg = asdict(config.text_cfg) | {
        "vocab_size": tokenizer.vocab_size,
        "context_length": tokenizer.context_length,
        "pad_id": tokenizer.special_ids.padding,
        "eos_id": tokenizer.special_ids.end_of_text,
        "pool_type": "eos",
    }
    bias = config.init_logit_bias
    return {
        "embed_dim": config.embed_dim,
        "vision_cfg": asdict(config.vision_cfg),
        "text_cfg": text_cfg,
        "custom_text": True,
        "init_logit_scale": math.log(config.init_logit_scale),
    } | ({} if bias is None else {"init_logit_bias": bias})


def build_from_open_clip_config(model_cfg: Mapping[str, Any]) -> DualEncoder:
    """Build the model that an `open_clip_config.json` describes, with random weights.

    Raises:
        ConfigError: it is not one that this class can run.
    """
    vision_cfg = dict(model_cfg["vision_cfg"]) | {"timm_model_pretrained": False}
    return _from_open_clip(
        dict(model_cfg) | {"vision_cfg": vision_cfg},
        math.exp(model_cfg.get("init_logit_scale", math.log(1 / 0.07))),
        model_cfg.get("init_logit_bias"),
    )


def _from_open_clip(
    model_cfg: Mapping[str, Any], init_logit_scale: float, init_logit_bias: float | None
) -> DualEncoder:
    name = model_cfg["vision_cfg"].get("timm_model_name")
    if name and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ConfigError(
            f"timm has no model {name!r}" + (f"; near it are {', '.join(close)}" if close else "")
        )
    try:
        towers = open_clip.CustomTextCLIP(
            model_cfg["embed_dim"], model_cfg["vision_cfg"], model_cfg["text_cfg"]
        )
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"the towers cannot be built: {error}") from error
    check_text_tower(towers.text)
    if name:
        _fit_timm_tower(towers.visual, model_cfg)
    return DualEncoder(
        towers.visual,
        towers.text,
        init_logit_scale=init_logit_scale,
        init_logit_bias=init_logit_bias,
    )


def _fit_timm_tower(visual: TimmModel, model_cfg: Mapping[str, Any]) -> None:
    """Mend what open_clip's adapter leaves wrong for some of timm's models.

    It does not tell a transformer the size of its pictures, and it reads a projection's width
    from `num_features` even where the model's own head widens its features first.
    """
    trunk = visual.trunk
    if hasattr(trunk, "set_input_size"):
        trunk.set_input_size(model_cfg["vision_cfg"]["image_size"])
    projection = getattr(visual.head, "proj", None)
    width = getattr(trunk, "head_hidden_size", None)
    if isinstance(projection, nn.Linear) and width not in (None, projection.in_features):
        bias = projection.bias is not None
        visual.head.proj = nn.Linear(width, projection.out_features, bias=bias)
