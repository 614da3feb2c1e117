"""The dual encoder: an image tower, a text tower, projections to one space, and a temperature."""

from functools import cached_property

from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import override

from vlm.models import image_tower, text_tower
from vlm.models.attention import pack_attention
from vlm.models.encoder import MAIN, Encoder, Replacement, States
from vlm.models.image_tower import ImageTower, PatchLayout
from vlm.models.text_tower import TextTower
from vlm.text.tokenizer import TokenBatch


class DualEncoder(Encoder):
    """Two towers that map images and texts to unit vectors of one space."""

    def __init__(
        self,
        visual: ImageTower,
        text: TextTower,
        *,
        init_logit_scale: float,
        init_logit_bias: float | None = None,
    ) -> None:
        super().__init__(init_logit_scale=init_logit_scale, init_logit_bias=init_logit_bias)
        self._memory_format = image_tower.memory_format_of(visual)
        self.visual = visual.to(memory_format=self._memory_format)
        self.text = text
        pack_attention(self)

    @property
    @override
    def embed_dim(self) -> int:
        return text_tower.feature_width(self.text)

    @property
    @override
    def image_width(self) -> int:
        return self._patch_layout.width

    @property
    @override
    def grid_size(self) -> tuple[int, int]:
        return self._patch_layout.grid

    @cached_property
    def _patch_layout(self) -> PatchLayout:
        return image_tower.patch_layout(self.visual)

    @property
    @override
    def token_embedding(self) -> nn.Embedding:
        return text_tower.token_embedding(self.text)

    @override
    def image_features(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> dict[str, Float[Tensor, "batch dim"]]:
        images = images.contiguous(memory_format=self._memory_format)
        return {MAIN: image_tower.features_of(self.visual, images).float()}

    @override
    def text_features(self, tokens: TokenBatch) -> dict[str, Float[Tensor, "batch dim"]]:
        return {MAIN: text_tower.encode_tokens(self.text, tokens).float()}

    @override
    def image_states(
        self,
        images: Float[Tensor, "batch 3 height width"],
        hidden: Bool[Tensor, "batch patches"] | None = None,
    ) -> States:
        if hidden is not None:
            images = image_tower.hide_patches(images, hidden, self.grid_size)
        images = images.contiguous(memory_format=self._memory_format)
        features, patches = image_tower.states_of(self.visual, images)
        return States(features={MAIN: features.float()}, tokens=patches, mask=None)

    @override
    def text_states(self, tokens: TokenBatch, replaced: Replacement | None = None) -> States:
        features, states = text_tower.token_states(self.text, tokens, replaced)
        return States(features={MAIN: features.float()}, tokens=states, mask=tokens.mask)

    @override
    def blocks(self) -> list[nn.Module]:
        return [*image_tower.image_blocks(self.visual), *text_tower.text_blocks(self.text)]

    @override
    def set_patch_dropout(self, ratio: float) -> None:
        image_tower.set_patch_dropout(self.visual, ratio)

    @override
    def accept_image_size(self, size: int) -> None:
        image_tower.interpolate_positions(self.visual)
        super().accept_image_size(size)

    @override
    def image_groups(self) -> list[list[nn.Parameter]]:
        return image_tower.image_groups(self.visual)

    @override
    def text_groups(self) -> list[list[nn.Parameter]]:
        return text_tower.text_groups(self.text)
