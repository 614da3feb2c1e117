"""`MultiwayEncoder`: M2-Encoder's towers, which end in layers that images and texts share."""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models.config import MAX_LOG_LOGIT_SCALE
from vlm.models.encoder import MAIN, UNIMODAL, States
from vlm.models.multiway_config import (
    IMAGE_BRANCH,
    POSITION_OFFSET,
    SHARED_BRANCH,
    TEXT_BRANCH,
    MultiwayConfig,
)
from vlm.models.multiway_layers import MultiwayStack
from vlm.models.multiway_unimodal import UnimodalEncoders, drop_patches
from vlm.text.tokenizer import TokenBatch

_KEPT_POSITIONS = POSITION_OFFSET + 1  # no position, twice, and the class token's


class MultiwayEncoder(nn.Module):
    """Images and texts through encoders of their own, then through one that they share.

    The vision-language encoder reads an image or a text, never both together. Its first state
    gives the feature of head `MAIN`, the first state before it that of head `UNIMODAL`
    (M2-Encoder, Guo et al. 2024). A text's first token stands for it all: the tokenizer should
    begin every text with the same piece.

    `state_dict` has the names of M2-Encoder's checkpoints, but for the two temperatures
    (`multiway_config.TEMPERATURES`) and for tensors that nothing reads (`is_held`).

    Args:
        config: The sizes.
        vocab_size: Ids of the tokenizer.
        init_logit_scale: Inverse temperature of both heads at the start, in (0, 100].
        init_logit_bias: Bias of a sigmoid loss's logits at the start; None for no bias.
    """

    def __init__(
        self,
        config: MultiwayConfig,
        *,
        vocab_size: int,
        init_logit_scale: float = 1 / 0.07,
        init_logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = UnimodalEncoders(config, vocab_size)
        self.backbone_vl = MultiwayStack(
            config,
            (SHARED_BRANCH,),
            drop_paths=config.drop_paths[config.layers :],
            positions={},
        )
        self.itc_text_proj = _projection(config)
        self.itc_image_proj = _projection(config)
        self.itc_vl_text_proj = _projection(config)
        self.itc_vl_image_proj = _projection(config)
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))
        self.log_unimodal_logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))
        self.logit_bias = (
            None if init_logit_bias is None else nn.Parameter(torch.tensor(init_logit_bias))
        )
        self._patch_dropout = 0.0
        self.clamp_logit_scale()

    @property
    def embed_dim(self) -> int:
        """Width of the common space."""
        return self.config.embed_dim

    @property
    def image_width(self) -> int:
        """Width of a patch's state."""
        return self.config.width

    @property
    def text_width(self) -> int:
        """Width of a token's state."""
        return self.config.width

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.config.grid_size

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """The inverse temperature of head `MAIN`."""
        return self.log_logit_scale.exp()

    @property
    def logit_scales(self) -> dict[str, Float[Tensor, ""]]:
        """The inverse temperature of each head, with gradient."""
        return {MAIN: self.logit_scale, UNIMODAL: self.log_unimodal_logit_scale.exp()}

    @property
    def token_embedding(self) -> nn.Embedding:
        """The rows of the vocabulary."""
        return self.backbone.text_embed

    def encode_image(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch dim"]:
        """Return a float32 unit vector for each image."""
        return F.normalize(self.image_features(images)[MAIN].float(), dim=-1)

    def encode_text(self, tokens: TokenBatch) -> Float[Tensor, "batch dim"]:
        """Return a float32 unit vector for each text, the same however far it is padded."""
        return F.normalize(self.text_features(tokens)[MAIN].float(), dim=-1)

    def image_features(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> dict[str, Float[Tensor, "batch dim"]]:
        """Return the features of images by head, not normalised.

        Cheaper than `image_states`, and in training the patches that `set_patch_dropout` says
        are left out: `image_states` always reads them all.
        """
        states = self.backbone.embed_images(images)
        if self.training and self._patch_dropout:
            states = drop_patches(states, self._patch_dropout)
        return self._image_features(*self._run(states, IMAGE_BRANCH, None, first_only=True))

    def text_features(self, tokens: TokenBatch) -> dict[str, Float[Tensor, "batch dim"]]:
        """Return the features of texts by head, not normalised."""
        tokens = _trimmed(tokens)
        states = self.backbone.embed_texts(tokens, None)
        return self._text_features(*self._run(states, TEXT_BRANCH, tokens.mask, first_only=True))

    def image_states(
        self,
        images: Float[Tensor, "batch 3 height width"],
        hidden: Bool[Tensor, "batch patches"] | None = None,
    ) -> States:
        """Return the features of images and the vision-language states of their patches.

        Args:
            images: Normalised images.
            hidden: True at patches, of `grid_size` row by row, that the tower must not see: the
                mask token takes their place.
        """
        states = self.backbone.embed_images(images, hidden)
        own, shared = self._run(states, IMAGE_BRANCH, None, first_only=False)
        return States(self._image_features(own, shared), shared[:, 1:], None)

    def text_states(
        self,
        tokens: TokenBatch,
        replaced: tuple[Bool[Tensor, "batch length"], Float[Tensor, " width"]] | None = None,
    ) -> States:
        """Return the features of texts and the vision-language states of their tokens.

        Args:
            tokens: Padded texts; states at padding are zeros.
            replaced: Where true, the given vector takes the place of a token's embedding.
        """
        trimmed = _trimmed(tokens)
        states = self.backbone.embed_texts(trimmed, replaced)
        own, shared = self._run(states, TEXT_BRANCH, trimmed.mask, first_only=False)
        visible = shared.masked_fill(~trimmed.mask[..., None], 0)
        padding = tokens.ids.shape[1] - visible.shape[1]
        return States(
            self._text_features(own, shared), F.pad(visible, (0, 0, 0, padding)), tokens.mask
        )

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Bring the temperatures back into their bound; called after every optimizer step."""
        self.log_logit_scale.clamp_(max=MAX_LOG_LOGIT_SCALE)
        self.log_unimodal_logit_scale.clamp_(max=MAX_LOG_LOGIT_SCALE)

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Compute activations again in the backward pass instead of keeping them, or do not."""
        self.backbone.encoder.grad_checkpointing = enable
        self.backbone_vl.grad_checkpointing = enable

    def set_patch_dropout(self, share: float) -> None:
        """Leave out a share in [0, 1) of an image's patches in training (FLIP, Li et al. 2023).

        Only where no states of patches are asked for: by `encode_image` and `image_features`.

        Raises:
            ConfigError: the share is out of range.
        """
        if not 0 <= share < 1:
            raise ConfigError(f"patch dropout is {share}; expected at least 0, less than 1")
        self._patch_dropout = share

    def untrained_parameters(self, *, unimodal: bool, patches: bool) -> list[nn.Parameter]:
        """Return what no gradient reaches in a kind of training.

        Args:
            unimodal: Whether the second head is trained.
            patches: Whether patches are hidden.
        """
        head = [
            *self.itc_text_proj.parameters(),
            *self.itc_image_proj.parameters(),
            self.log_unimodal_logit_scale,
        ]
        return [
            *([] if unimodal else head),
            *([] if patches else [self.backbone.vision_embed.mask_token]),
        ]

    def image_groups(self) -> list[list[nn.Parameter]]:
        """Return the image side's parameters from the input to the output, a list a stage.

        The vision-language layers are the text side's as well.
        """
        projections = [*self.itc_image_proj.parameters(), *self.itc_vl_image_proj.parameters()]
        return self._groups(self.backbone.vision_embed, IMAGE_BRANCH, projections)

    def text_groups(self) -> list[list[nn.Parameter]]:
        """Return the text side's parameters from the input to the output, a list a stage.

        The vision-language layers are the image side's as well.
        """
        projections = [*self.itc_text_proj.parameters(), *self.itc_vl_text_proj.parameters()]
        return self._groups(self.backbone.text_embed, TEXT_BRANCH, projections)

    def _groups(
        self, embedding: nn.Module, branch: str, projections: list[nn.Parameter]
    ) -> list[list[nn.Parameter]]:
        own, shared = self.backbone.encoder, self.backbone_vl
        positions = own.embed_positions[branch].parameters()
        *own_layers, own_last = own.layer_parameters(branch)
        return [
            [*embedding.parameters(), *positions],
            *own_layers,
            [*own_last, *own.layer_norm[branch].parameters()],
            *shared.layer_parameters(SHARED_BRANCH),
            [*shared.layer_norm[SHARED_BRANCH].parameters(), *projections],
        ]

    def _run(
        self,
        embeddings: Float[Tensor, "batch length width"],
        branch: str,
        mask: Bool[Tensor, "batch length"] | None,
        first_only: bool,
    ) -> tuple[Float[Tensor, "batch length width"], Float[Tensor, "batch positions width"]]:
        own = self.backbone.encoder(embeddings, branch, mask=mask, first_only=False)
        return own, self.backbone_vl(own, SHARED_BRANCH, mask=mask, first_only=first_only)

    def _image_features(self, own: Tensor, shared: Tensor) -> dict[str, Tensor]:
        return {
            MAIN: self.itc_vl_image_proj(shared[:, 0]),
            UNIMODAL: self.itc_image_proj(own[:, 0]),
        }

    def _text_features(self, own: Tensor, shared: Tensor) -> dict[str, Tensor]:
        return {
            MAIN: self.itc_vl_text_proj(shared[:, 0]),
            UNIMODAL: self.itc_text_proj(own[:, 0]),
        }


def resized_image_positions(
    table: Float[Tensor, "rows width"], grid: tuple[int, int]
) -> Float[Tensor, "new_rows width"]:
    """Return an image's position table for another grid of patches.

    The rows before the patches are kept; each new patch has the mean of the old ones that its
    area covers, as M2-Encoder's own loader has it.

    Args:
        table: The three rows before the patches, and those of a square grid, row by row.
        grid: Rows and columns of the new grid, each at least 1.

    Raises:
        ConfigError: the table is not one of a square grid.
    """
    side = math.isqrt(max(0, len(table) - _KEPT_POSITIONS))
    if side == 0 or len(table) != _KEPT_POSITIONS + side * side:
        raise ConfigError(
            f"a table of {len(table)} image positions; expected {_KEPT_POSITIONS} and a square"
        )
    if grid == (side, side):
        return table.clone()
    old = table[_KEPT_POSITIONS:].float().T.reshape(1, -1, side, side)
    new = F.interpolate(old, size=grid, mode="area")[0].flatten(start_dim=1).T
    return torch.cat([table[:_KEPT_POSITIONS], new.to(table.dtype)])


def _projection(config: MultiwayConfig) -> nn.Sequential:
    linear = nn.Linear(config.width, config.embed_dim, bias=False)
    nn.init.normal_(linear.weight, std=config.width**-0.5)
    return nn.Sequential(OrderedDict(fc=linear))


def _trimmed(tokens: TokenBatch) -> TokenBatch:
    """Leave off the positions at which every text is padding."""
    length = max(1, int(tokens.mask.any(dim=0).sum()))
    return TokenBatch(tokens.ids[:, :length], tokens.mask[:, :length])
