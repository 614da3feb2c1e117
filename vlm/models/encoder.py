"""`Encoder`: what every model of images and texts can do, whatever its towers are."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models.config import MAX_LOG_LOGIT_SCALE, MAX_LOGIT_SCALE
from vlm.text.tokenizer import TokenBatch

MAIN = "main"
"""The head whose features are the model's: those that `encode_image` and `encode_text` give."""

UNIMODAL = "unimodal"
"""A second head on each side's states before the sides share a network, where a model has it."""


Replacement: TypeAlias = tuple[Bool[Tensor, "batch length"], Float[Tensor, " width"]]
"""Where true, the vector takes the place of a token's embedding."""


class States(NamedTuple):
    """A tower's output: a feature per head for each input, and a vector per token or patch."""

    features: dict[str, Float[Tensor, "batch dim"]]
    """By head, `MAIN` first; not normalised."""
    tokens: Float[Tensor, "batch length width"]
    """The last states of a text's tokens, or of an image's patches row by row."""
    mask: Bool[Tensor, "batch length"] | None
    """True at the tokens of a text, false at padding; None for images: all patches count."""


class Encoder(nn.Module, ABC):
    """A module that maps images and texts to unit vectors of one space.

    Args:
        init_logit_scale: Inverse temperature at the start, in (0, 100].
        init_logit_bias: Bias of a sigmoid loss's logits at the start; None for no bias.
    """

    def __init__(self, *, init_logit_scale: float, init_logit_bias: float | None) -> None:
        super().__init__()
        log_scale = min(math.log(init_logit_scale), MAX_LOG_LOGIT_SCALE)
        self.log_logit_scale = nn.Parameter(torch.tensor(log_scale))
        self.logit_bias = (
            None if init_logit_bias is None else nn.Parameter(torch.tensor(float(init_logit_bias)))
        )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.log_logit_scale.device

    @property
    @abstractmethod
    def embed_dim(self) -> int:
        """Width of the common space."""

    @property
    @abstractmethod
    def image_width(self) -> int:
        """Width of a patch's state."""

    @property
    def text_width(self) -> int:
        """Width of a token's state."""
        return self.token_embedding.embedding_dim

    @property
    @abstractmethod
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches that `image_states` gives."""

    @property
    @abstractmethod
    def token_embedding(self) -> nn.Embedding:
        """The rows of the vocabulary."""

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """The inverse temperature of head `MAIN`, with gradient."""
        return self.log_logit_scale.exp()

    @property
    def logit_scales(self) -> dict[str, Float[Tensor, ""]]:
        """The inverse temperature of each head, with gradient."""
        return {MAIN: self.logit_scale}

    def encode_image(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch dim"]:
        """Return a float32 unit vector for each image."""
        return F.normalize(self.image_features(images)[MAIN].float(), dim=-1)

    def encode_text(self, tokens: TokenBatch) -> Float[Tensor, "batch dim"]:
        """Return a float32 unit vector for each text, the same however far it is padded."""
        return F.normalize(self.text_features(tokens)[MAIN].float(), dim=-1)

    @abstractmethod
    def image_features(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> dict[str, Float[Tensor, "batch dim"]]:
        """Return the features of images by head, not normalised.

        Cheaper than `image_states`, and the only pass that patch dropout applies to.
        """

    @abstractmethod
    def text_features(self, tokens: TokenBatch) -> dict[str, Float[Tensor, "batch dim"]]:
        """Return the features of texts by head, not normalised."""

    @abstractmethod
    def image_states(
        self,
        images: Float[Tensor, "batch 3 height width"],
        hidden: Bool[Tensor, "batch patches"] | None = None,
    ) -> States:
        """Return the features of images and the states of all their patches.

        `hidden` is true at patches, of `grid_size` row by row, that the tower must not see.

        Raises:
            ConfigError: the image tower has no states of patches.
        """

    @abstractmethod
    def text_states(self, tokens: TokenBatch, replaced: Replacement | None = None) -> States:
        """Return the features of texts and the states of their tokens, some of them replaced."""

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Bring the temperatures back into their bound; called after every optimizer step.

        Bounding the stored parameter, not the scale in the forward pass, leaves the scale its
        gradient at the bound. A model with a bias, for a sigmoid loss, has no bound: released
        SigLIP models have scales above CLIP's, and lowering one at once would shift all logits.
        """
        if self.logit_bias is None:
            clamp_log_scale(self.log_logit_scale)

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Return the layers that the towers repeat, from the input to the output.

        They hold most of the weights and activations, and each is called as a whole: what is
        computed again, compiled or sharded is one block at a time.
        """

    @abstractmethod
    def set_patch_dropout(self, ratio: float) -> None:
        """Drop a ratio, in [0, 1), of an image's patches in training (FLIP, Li et al. 2023).

        Raises:
            ConfigError: the image tower has no patches to drop.
        """

    @torch.no_grad()
    def accept_image_size(self, size: int) -> None:
        """Make sure that images of another size can be read as well, a square of pixels.

        Raises:
            ConfigError: the image tower reads images of its own size alone.
        """
        training, images = self.training, torch.zeros(1, 3, size, size, device=self.device)
        try:
            self.eval().image_features(images)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ConfigError(
                f"the image tower cannot read images of {size} pixels: {error}; expected its own "
                "size, a convolutional tower, or a vision transformer of timm and whole patches"
            ) from error
        finally:
            self.train(training)

    def untrained_parameters(self, *, unimodal: bool, patches: bool) -> list[nn.Parameter]:
        """Return the parameters that no gradient reaches: those of a part that is not used."""
        return []

    @abstractmethod
    def image_groups(self) -> list[list[nn.Parameter]]:
        """Return the image side's parameters from the input to the output, a list per stage."""

    @abstractmethod
    def text_groups(self) -> list[list[nn.Parameter]]:
        """Return the text side's parameters from the input to the output, a list per stage."""


def clamp_log_scale(log_scale: Tensor) -> None:
    """Bring the logarithm of a scale below its bound, which narrow types would round up."""
    bound = torch.tensor(MAX_LOG_LOGIT_SCALE, dtype=log_scale.dtype).item()
    if math.exp(bound) > MAX_LOGIT_SCALE:
        bound *= 1 - torch.finfo(log_scale.dtype).eps
    log_scale.clamp_(max=bound)
