"""The multiway towers' first half: patches and tokens to states, each side for itself."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models.encoder import Replacement
from vlm.models.multiway_config import IMAGE_BRANCH, TEXT_BRANCH, MultiwayConfig
from vlm.models.multiway_layers import EMBEDDING_STD, MultiwayStack, embedding
from vlm.text.tokenizer import TokenBatch


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
        """Return the tokens with their positions, and zeros at padding.

        Args:
            tokens: Padded texts.
            replaced: Where true, the given vector takes the place of a token's embedding.
        """
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

    Args:
        states: The class token and the patches, with their positions.
        ratio: Fraction of the patches to drop, in [0, 1); one patch is always kept.
    """
    batch, length, width = states.shape
    count = max(1, round((length - 1) * (1 - ratio)))
    # The largest of independent scores are a draw without replacement, for each image its own.
    scores = torch.rand(batch, length - 1, device=states.device)
    # Plus 1 for the class token. Order does not matter: states carry their positions.
    kept = 1 + scores.topk(count, dim=1, sorted=False).indices
    patches = states.gather(1, kept[..., None].expand(-1, -1, width))
    return torch.cat([states[:, :1], patches], dim=1)
