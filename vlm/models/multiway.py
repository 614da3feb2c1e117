"""`MultiwayEncoder`: M2-Encoder's towers, which end in layers that images and texts share."""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override

from vlm.errors import ConfigError
from vlm.models.encoder import (
    MAIN,
    UNIMODAL,
    Encoder,
    Replacement,
    States,
    clamp_log_scale,
)
from vlm.models.multiway_config import (
    IMAGE_BRANCH,
    POSITION_OFFSET,
    SHARED_BRANCH,
    TEXT_BRANCH,
    MultiwayConfig,
)
from vlm.models.multiway_layers import EMBEDDING_STD, MultiwayStack, embedding
from vlm.text.tokenizer import TokenBatch

_KEPT_POSITIONS = POSITION_OFFSET + 1  # no position, twice, and the class token's


class MultiwayEncoder(Encoder):
    """Images and texts through encoders of their own, then through one that they share.

    The vision-language encoder reads an image or a text, never both together. Its first state
    gives the feature of head `MAIN`, the first state before it that of head `UNIMODAL`
    (M2-Encoder, Guo et al. 2024), whose temperature starts where the main one does. A text's first
    token stands for it all: the tokenizer should begin every text with the same piece.

    `state_dict` has the names of M2-Encoder's checkpoints, but for the two temperatures
    (`multiway_config.TEMPERATURES`) and for tensors that nothing reads (`is_held`).
    """

    def __init__(
        self,
        config: MultiwayConfig,
        *,
        vocab_size: int,
        init_logit_scale: float = 1 / 0.07,
        init_logit_bias: float | None = None,
    ) -> None:
        super().__init__(init_logit_scale=init_logit_scale, init_logit_bias=init_logit_bias)
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
        # A temperature of its own, which starts where the main one does, within its bound.
        self.log_unimodal_logit_scale = nn.Parameter(self.log_logit_scale.detach().clone())
        self._patch_dropout = 0.0

    @property
    @override
    def embed_dim(self) -> int:
        return self.config.embed_dim

    @property
    @override
    def image_width(self) -> int:
        return self.config.width

    @property
    @override
    def grid_size(self) -> tuple[int, int]:
        return self.config.grid_size

    @property
    @override
    def logit_scales(self) -> dict[str, Float[Tensor, ""]]:
        return {MAIN: self.logit_scale, UNIMODAL: self.log_unimodal_logit_scale.exp()}

    @property
    @override
    def token_embedding(self) -> nn.Embedding:
        return self.backbone.text_embed

    @override
    def image_features(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> dict[str, Float[Tensor, "batch dim"]]:
        states = self.backbone.embed_images(images)
        if self.training and self._patch_dropout:
            states = drop_patches(states, self._patch_dropout)
        return self._image_features(*self._run(states, IMAGE_BRANCH, None, first_only=True))

    @override
    def text_features(self, tokens: TokenBatch) -> dict[str, Float[Tensor, "batch dim"]]:
        tokens = _trimmed(tokens)
        states = self.backbone.embed_texts(tokens, None)
        return self._text_features(*self._run(states, TEXT_BRANCH, tokens.mask, first_only=True))

    @override
    def image_states(
        self,
        images: Float[Tensor, "batch 3 height width"],
        hidden: Bool[Tensor, "batch patches"] | None = None,
    ) -> States:
        states = self.backbone.embed_images(images, hidden)
        own, shared = self._run(states, IMAGE_BRANCH, None, first_only=False)
        return States(self._image_features(own, shared), shared[:, 1:], None)

    @override
    def text_states(
        self,
        tokens: TokenBatch,
        replaced: Replacement | None = None,
    ) -> States:
        trimmed = _trimmed(tokens)
        if replaced is not None:
            replaced = (replaced[0][:, : trimmed.ids.shape[1]], replaced[1])
        states = self.backbone.embed_texts(trimmed, replaced)
        own, shared = self._run(states, TEXT_BRANCH, trimmed.mask, first_only=False)
        # Layers leave bias-driven values at padding; decoders must not read those as tokens.
        visible = shared.masked_fill(~trimmed.mask[..., None], 0)
        padding = tokens.ids.shape[1] - visible.shape[1]
        return States(
            self._text_features(own, shared), F.pad(visible, (0, 0, 0, padding)), tokens.mask
        )

    @override
    def clamp_logit_scale(self) -> None:
        super().clamp_logit_scale()
        with torch.no_grad():
            clamp_log_scale(self.log_unimodal_logit_scale)

    @override
    def blocks(self) -> list[nn.Module]:
        return [*self.backbone.encoder.layers, *self.backbone_vl.layers]

    @override
    def set_patch_dropout(self, ratio: float) -> None:
        if not 0 <= ratio < 1:
            raise ConfigError(f"patch dropout is {ratio}; expected at least 0, less than 1")
        self._patch_dropout = ratio

    @override
    def untrained_parameters(self, *, unimodal: bool, patches: bool) -> list[nn.Parameter]:
        head = [
            *self.itc_text_proj.parameters(),
            *self.itc_image_proj.parameters(),
            self.log_unimodal_logit_scale,
        ]
        return [
            *([] if unimodal else head),
            *([] if patches else [self.backbone.vision_embed.mask_token]),
        ]

    @override
    def image_groups(self) -> list[list[nn.Parameter]]:
        projections = [*self.itc_image_proj.parameters(), *self.itc_vl_image_proj.parameters()]
        return self._groups(self.backbone.vision_embed, IMAGE_BRANCH, projections)

    @override
    def text_groups(self) -> list[list[nn.Parameter]]:
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


class UnimodalEncoders(nn.Module):
    """The images' and the texts' encoders: their embeddings, and one stack with two branches."""

    def __init__(self, config: MultiwayConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.text_embed = embedding(vocab_size, config.width)
        self.vision_embed = PatchEmbedding(config)
        self.encoder = MultiwayStack(
            config,
            (IMAGE_BRANCH, TEXT_BRANCH),
            drop_paths=config.drop_paths[: config.layers],
            positions={IMAGE_BRANCH: config.image_positions, TEXT_BRANCH: config.text_positions},
        )

    def embed_images(
        self,
        images: Float[Tensor, "batch 3 height width"],
        hidden: Bool[Tensor, "batch patches"] | None = None,
    ) -> Float[Tensor, "batch length channels"]:
        """Return the class token and the patches, with their positions."""
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            raise ConfigError(
                f"the images are {images.shape[-1]} x {images.shape[-2]} pixels; "
                f"expected {size} x {size}"
            )
        return self.encoder.add_positions(self.vision_embed(images, hidden), IMAGE_BRANCH)

    def embed_texts(
        self,
        tokens: TokenBatch,
        replaced: Replacement | None = None,
    ) -> Float[Tensor, "batch length width"]:
        """Return the tokens with their positions, some of them replaced, and zeros at padding."""
        length = tokens.ids.shape[1]
        if length > self.config.context_length:
            raise ConfigError(
                f"a text has {length} tokens; expected at most {self.config.context_length}, "
                "for which there are positions"
            )
        states: Tensor = self.text_embed(tokens.ids)
        if replaced is not None:
            where, vector = replaced
            states = torch.where(where[..., None], vector.to(states.dtype), states)
        states = self.encoder.add_positions(states, TEXT_BRANCH)
        return states.masked_fill(~tokens.mask[..., None], 0)


class PatchEmbedding(nn.Module):
    """A linear map of each patch, after a class token."""

    def __init__(self, config: MultiwayConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        for token in (self.cls_token, self.mask_token):
            nn.init.normal_(token, std=EMBEDDING_STD)

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        hidden: Bool[Tensor, "batch patches"] | None,
    ) -> Float[Tensor, "batch length channels"]:
        """Return the class token and the patches row by row, hidden ones as the mask token."""
        patches: Tensor = self.proj(images).flatten(start_dim=2).transpose(1, 2)
        if hidden is not None:
            patches = torch.where(hidden[..., None], self.mask_token.to(patches.dtype), patches)
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)


def drop_patches(
    states: Float[Tensor, "batch length width"], ratio: float
) -> Float[Tensor, "batch kept width"]:
    """Keep the class token, and patches drawn at random for each image on its own.

    A ratio in [0, 1) of the patches is dropped; one patch is always kept.
    """
    batch, length, width = states.shape
    count = max(1, round((length - 1) * (1 - ratio)))
    # The largest of independent scores are a draw without replacement, for each image its own.
    scores = torch.rand(batch, length - 1, device=states.device)
    # Plus 1 for the class token. Order does not matter: states carry their positions.
    kept = 1 + scores.topk(count, dim=1, sorted=False).indices
    patches = states.gather(1, kept[..., None].expand(-1, -1, width))
    return torch.cat([states[:, :1], patches], dim=1)


def resized_image_positions(
    table: Float[Tensor, "rows width"], grid: tuple[int, int]
) -> Float[Tensor, "new_rows width"]:
    """Return an image's position table for another grid of patches, of rows and columns.

    The three rows before the patches are kept; each new patch has the mean of the old ones that
    its area covers, as M2-Encoder's own loader has it.

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
    # As an image of `width` channels, because interpolation works on the last two dimensions.
    old = table[_KEPT_POSITIONS:].float().T.reshape(1, -1, side, side)
    new = F.interpolate(old, size=grid, mode="area")[0].flatten(start_dim=1).T
    return torch.cat([table[:_KEPT_POSITIONS], new.to(table.dtype)])


def _projection(config: MultiwayConfig) -> nn.Sequential:
    linear = nn.Linear(config.width, config.embed_dim, bias=False)
    nn.init.normal_(linear.weight, std=config.width**-0.5)
    return nn.Sequential(OrderedDict(fc=linear))


def _trimmed(tokens: TokenBatch) -> TokenBatch:
    """Leave off the positions at which every text is padding."""
    # A synchronisation with the device. At least 1: attention over nothing would give NaN.
    length = max(1, int(tokens.mask.any(dim=0).sum()))
    return TokenBatch(tokens.ids[:, :length], tokens.mask[:, :length])
