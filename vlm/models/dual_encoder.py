"""The dual encoder: an image tower, a text tower, projections to one space, and a temperature."""

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.models import image_tower, text_tower
from vlm.models.config import MAX_LOG_LOGIT_SCALE
from vlm.models.encoder import MAIN, States
from vlm.models.image_tower import ImageTower, PatchLayout
from vlm.models.text_tower import Replacement, TextTower
from vlm.text.tokenizer import TokenBatch


class DualEncoder(nn.Module):
    """Two towers that map images and texts to unit vectors of one space: an `Encoder`.

    Args:
        visual: Maps normalised images to `embed_dim` features.
        text: A transformer that `encode_tokens` can run.
        init_logit_scale: Inverse temperature at the start.
        init_logit_bias: Bias of a sigmoid loss's logits at the start; None for no bias.
    """

    def __init__(
        self,
        visual: ImageTower,
        text: TextTower,
        *,
        init_logit_scale: float,
        init_logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        self._memory_format = image_tower.memory_format_of(visual)
        self.visual = visual.to(memory_format=self._memory_format)
        self.text = text
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))
        self.logit_bias = (
            None if init_logit_bias is None else nn.Parameter(torch.tensor(float(init_logit_bias)))
        )
        self.clamp_logit_scale()

    @property
    def embed_dim(self) -> int:
        """Width of the common space."""
        return text_tower.feature_width(self.text)

    @property
    def image_width(self) -> int:
        """Width of a patch's state."""
        return self._patch_layout.width

    @property
    def text_width(self) -> int:
        """Width of a token's state."""
        return self.token_embedding.embedding_dim

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches that `image_states` gives."""
        return self._patch_layout.grid

    @cached_property
    def _patch_layout(self) -> PatchLayout:
        return image_tower.patch_layout(self.visual)

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """The inverse temperature."""
        return self.log_logit_scale.exp()

    @property
    def logit_scales(self) -> dict[str, Float[Tensor, ""]]:
        """The inverse temperature of each head, with gradient."""
        return {MAIN: self.logit_scale}

    @property
    def token_embedding(self) -> nn.Embedding:
        """The rows of the vocabulary."""
        return text_tower.token_embedding(self.text)

    def encode_image(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch dim"]:
        """Return a float32 unit vector for each image."""
        return F.normalize(self.image_features(images)[MAIN], dim=-1)

    def encode_text(self, tokens: TokenBatch) -> Float[Tensor, "batch dim"]:
        """Return a float32 unit vector for each text."""
        return F.normalize(self.text_features(tokens)[MAIN], dim=-1)

    def image_features(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> dict[str, Float[Tensor, "batch dim"]]:
        """Return the features of images by head, float32 and not normalised."""
        return {MAIN: self.visual(images.contiguous(memory_format=self._memory_format)).float()}

    def text_features(self, tokens: TokenBatch) -> dict[str, Float[Tensor, "batch dim"]]:
        """Return the features of texts by head, float32 and not normalised."""
        return {MAIN: text_tower.encode_tokens(self.text, tokens).float()}

    def image_states(
        self,
        images: Float[Tensor, "batch 3 height width"],
        hidden: Bool[Tensor, "batch patches"] | None = None,
    ) -> States:
        """Return the features of images and the states of their patches.

        Patch dropout leaves none out here.

        Args:
            images: Normalised images.
            hidden: True at patches, of `grid_size` row by row, whose pixels become the mean
                colour before the tower sees them.

        Raises:
            ConfigError: the image tower has no states of patches.
        """
        if hidden is not None:
            images = image_tower.hide_patches(images, hidden, self.grid_size)
        images = images.contiguous(memory_format=self._memory_format)
        features, patches = image_tower.states_of(self.visual, images)
        return States(features={MAIN: features.float()}, tokens=patches, mask=None)

    def text_states(self, tokens: TokenBatch, replaced: Replacement | None = None) -> States:
        """Return the features of texts and the states of their tokens.

        Args:
            tokens: Padded texts.
            replaced: Where true, the given vector takes the place of a token's embedding.
        """
        features, states = text_tower.token_states(self.text, tokens, replaced)
        return States(features={MAIN: features.float()}, tokens=states, mask=tokens.mask)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Bring the temperature back into its bound; called after every optimizer step.

        Bounding the stored parameter, not the scale in the forward pass, leaves the scale its
        gradient at the bound.
        """
        self.log_logit_scale.clamp_(max=MAX_LOG_LOGIT_SCALE)

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Compute activations again in the backward pass instead of keeping them, or do not.

        Raises:
            ConfigError: the image tower cannot.
        """
        image_tower.set_image_checkpointing(self.visual, enable)
        text_tower.set_text_checkpointing(self.text, enable)

    def set_patch_dropout(self, share: float) -> None:
        """Leave out a share in [0, 1) of an image's patches in training (FLIP, Li et al. 2023).

        Raises:
            ConfigError: the image tower has no patches to leave out.
        """
        image_tower.set_patch_dropout(self.visual, share)

    def untrained_parameters(self, *, unimodal: bool, patches: bool) -> list[nn.Parameter]:
        """Return what no gradient reaches in a kind of training: nothing, in any.

        Args:
            unimodal: Whether a second head is trained; there is none here.
            patches: Whether patches are hidden; their pixels are blank, without parameters.
        """
        return []

    def image_groups(self) -> list[list[nn.Parameter]]:
        """Return the image side's parameters from the input to the output, a list a stage."""
        return image_tower.image_groups(self.visual)

    def text_groups(self) -> list[list[nn.Parameter]]:
        """Return the text side's parameters from the input to the output, a list a stage."""
        return text_tower.text_groups(self.text)
