"""Masked words predicted from the image, hidden patches from the text: fine-grained objectives.

Cross-modal masked language and image modelling, CMLM and CMIM, of M2-Encoder (Guo et al. 2024),
which follow SyCoCa (Ma et al. 2024). Each has a decoder that only training needs.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm.errors import ConfigError
from vlm.models.batch_norm import kept_statistics
from vlm.models.config import CMIM, CMLM, MaskedConfig
from vlm.models.encoder import Encoder, States
from vlm.text.tokenizer import TokenBatch

_HEAD_WIDTH = 64  # of the decoders, where no number of heads is given
_ROWS_AT_ONCE = 4096  # of logits over the vocabulary that are kept for the backward pass


class Hidden(NamedTuple):
    """What is hidden of a batch, and which of its images the texts belong to."""

    rows: Mapping[str, Int64[Tensor, " texts"]]
    """By the names of the texts, the image of each; past the last image for a text of none."""
    words: Mapping[str, Bool[Tensor, "texts length"]]
    """True at masked tokens, by the names of the texts that are masked."""
    patches: Bool[Tensor, "batch patches"] | None = None
    """True at hidden patches, row by row; None where none are."""


class MaskedModelling(nn.Module):
    """The decoders and heads of CMLM and CMIM, as far as they are on; no part of a bundle.

    `image_size` is in pixels; `teacher_width` that of the patch states of a teacher.

    Raises:
        ConfigError: no loss is on, or the images cannot be divided into the encoder's patches.
    """

    def __init__(
        self,
        config: MaskedConfig,
        encoder: Encoder,
        *,
        image_size: int | tuple[int, int],
        teacher_width: int | None = None,
    ) -> None:
        super().__init__()
        if not config.weights:
            raise ConfigError("cmlm_weight and cmim_weight are 0; expected one of them above 0")
        self.names = tuple(config.weights)
        self.pixels = teacher_width is None
        image_width, text_width = encoder.image_width, encoder.text_width
        sizes = {"width": config.decoder_width, "heads": config.decoder_heads}
        if CMLM in self.names:
            embedding = encoder.token_embedding.weight
            self.mask_vector = nn.Parameter(torch.empty(embedding.shape[1]).normal_(std=0.02))
            self.image_to_text = CrossDecoder(
                text_width, image_width, layers=config.decoder_layers, **sizes
            )
            self.word_head = _WordHead(self.image_to_text.width, *embedding.shape)
        if CMIM in self.names:
            self.text_to_image = CrossDecoder(
                image_width, text_width, layers=config.decoder_layers, **sizes
            )
            size = (image_size, image_size) if isinstance(image_size, int) else image_size
            numbers = teacher_width or 3 * math.prod(_cell(size, encoder.grid_size))
            self.patch_head = nn.Linear(self.text_to_image.width, numbers)

    @property
    def hides_patches(self) -> bool:
        """Whether patches are hidden."""
        return CMIM in self.names

    def forward(
        self,
        encoder: Encoder,
        images: Float[Tensor, "batch 3 height width"],
        image_states: States,
        texts: Mapping[str, TokenBatch],
        text_states: Mapping[str, States],
        hidden: Hidden,
        teacher_tokens: Float[Tensor, "batch patches teacher_width"] | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Encode texts without their words, images without patches, and predict what is missing.

        The states given are those of whole images and texts: at most one caption of each image a
        language. Where nothing is hidden a loss is 0, with gradients of 0.

        Returns:
            Means over all masked words (cross-entropy) and all hidden patches, not weighted.

        Raises:
            ConfigError: images, or a teacher's states, do not have the sizes agreed on.
        """
        losses = {}
        if CMLM in self.names:
            losses[CMLM] = self._words_loss(encoder, image_states, texts, hidden)
        if CMIM in self.names:
            assert hidden.patches is not None
            target = patch_pixels(images, encoder.grid_size) if self.pixels else teacher_tokens
            assert target is not None
            with kept_statistics(encoder):  # evaluation sees whole images
                states = encoder.image_states(images, hidden=hidden.patches)
            losses[CMIM] = self._patches_loss(
                states, text_states, hidden.rows, hidden.patches, target
            )
        return losses

    def _words_loss(
        self,
        encoder: Encoder,
        image_states: States,
        texts: Mapping[str, TokenBatch],
        hidden: Hidden,
    ) -> Float[Tensor, ""]:
        predicted, ids = [], []
        for language in (name for name in texts if name in hidden.words):
            tokens, mask = texts[language], hidden.words[language]
            states = encoder.text_states(tokens, replaced=(mask, self.mask_vector))
            # A text of no image has no masked words, so that it may look at any.
            rows = hidden.rows[language].clamp(max=len(image_states.tokens) - 1)
            seen = image_states.tokens.index_select(0, rows)
            decoded = self.image_to_text(states.tokens, seen, query_mask=states.mask)
            predicted.append(decoded[mask])
            ids.append(tokens.ids[mask])
        rows = encoder.token_embedding.weight
        total: Tensor = self.word_head(torch.cat(predicted), torch.cat(ids), rows)
        return total / max(1, sum(map(len, ids)))

    def _patches_loss(
        self,
        states: States,
        text_states: Mapping[str, States],
        rows: Mapping[str, Tensor],
        patches: Bool[Tensor, "batch patches"],
        target: Float[Tensor, "batch target_patches numbers"],
    ) -> Float[Tensor, ""]:
        expected = (patches.shape[1], self.patch_head.out_features)
        if target.shape[1:] != expected:
            raise ConfigError(
                f"images have {target.shape[1]} patches of {target.shape[2]} numbers to predict; "
                f"expected {expected[0]} of {expected[1]}"
            )
        tokens, masks = [], []
        for language, text in text_states.items():
            assert text.mask is not None
            tokens.append(by_sample(text.tokens, rows[language], len(patches)))
            masks.append(by_sample(text.mask, rows[language], len(patches)))
        decoded = self.text_to_image(
            states.tokens, torch.cat(tokens, dim=1), key_mask=torch.cat(masks, dim=1)
        )
        predicted = self.patch_head(decoded[patches]).float()
        # He et al. 2022, section 3: each patch by its own mean and deviation; Baevski et al. 2022
        # (data2vec), section 3, for a teacher's states.
        truth = F.layer_norm(target.detach()[patches].float(), target.shape[2:], eps=1e-6)
        distance = F.mse_loss if self.pixels else F.smooth_l1_loss
        total: Tensor = distance(predicted, truth, reduction="sum")
        return total / max(1, truth.numel())


def by_sample(
    values: Shaped[Tensor, "texts ..."],
    rows: Int64[Tensor, " texts"],
    samples: int,
    *,
    missing: int = 0,
) -> Shaped[Tensor, "samples ..."]:
    """Return what texts have at the rows of their samples, and `missing` at the other rows.

    A row past the last sample is that of a text of none, and is left out.
    """
    table = values.new_full((samples + 1, *values.shape[1:]), missing)
    return table.index_copy(0, rows, values)[:samples]


class CrossDecoder(nn.Module):
    """Layers of attention to oneself, attention to the other side, and a feed-forward network.

    Layers are normalised at their beginning, and there are no positions: the states have theirs.
    The width is by default that of the queries, with a head for every 64 of it.

    Raises:
        ConfigError: the heads do not divide the width.
    """

    def __init__(
        self,
        query_width: int,
        key_width: int,
        *,
        width: int | None = None,
        heads: int | None = None,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.width = width = width or query_width
        heads = heads or (1 if width % _HEAD_WIDTH else width // _HEAD_WIDTH)
        if width % heads:
            raise ConfigError(f"decoder_heads is {heads}; expected a divisor of the width {width}")
        self.query_in = nn.Sequential(nn.LayerNorm(query_width), nn.Linear(query_width, width))
        self.key_in = nn.Sequential(nn.LayerNorm(key_width), nn.Linear(key_width, width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        queries: Float[Tensor, "batch queries query_width"],
        keys: Float[Tensor, "batch keys key_width"],
        *,
        query_mask: Bool[Tensor, "batch queries"] | None = None,
        key_mask: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch queries width"]:
        """Return decoded states; masks are False at padding, whose states mean nothing.

        Queries of an example that has no keys look at zeros.
        """
        states, seen = self.query_in(queries), self.key_in(keys)
        if key_mask is not None:
            seen = seen * key_mask.any(dim=1)[:, None, None]
        for layer in self.layers:
            states = layer(
                states,
                seen,
                tgt_key_padding_mask=_padding(query_mask),
                memory_key_padding_mask=_padding(key_mask),
            )
        decoded: Tensor = self.norm(states)
        return decoded


def _padding(mask: Tensor | None) -> Tensor | None:
    """Return where attention must not look; everywhere it may, where it could look nowhere."""
    return None if mask is None else ~mask & mask.any(dim=1, keepdim=True)


class _WordHead(nn.Module):
    """BERT's head: a layer, then products with the rows of the vocabulary, and a bias a piece."""

    def __init__(self, width: int, vocab_size: int, embedding_width: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            nn.Linear(width, embedding_width), nn.GELU(), nn.LayerNorm(embedding_width)
        )
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(
        self,
        states: Float[Tensor, "words width"],
        ids: Int64[Tensor, " words"],
        rows: Float[Tensor, "vocabulary embedding_width"],
    ) -> Float[Tensor, ""]:
        """Return the sum of the words' cross-entropies."""
        states = self.layer(states)
        if len(states) <= _ROWS_AT_ONCE:
            return self._loss(states, ids, rows)
        parts = zip(
            torch.split(states, _ROWS_AT_ONCE), torch.split(ids, _ROWS_AT_ONCE), strict=True
        )
        # Logits of a large vocabulary outweigh all else: they are computed again when needed.
        losses = [checkpoint(self._loss, *part, rows, use_reentrant=False) for part in parts]
        return torch.stack(losses).sum()

    def _loss(self, states: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(states, rows, self.bias).float(), ids, reduction="sum")


def patch_pixels(
    images: Float[Tensor, "batch 3 height width"], grid: tuple[int, int]
) -> Float[Tensor, "batch patches numbers"]:
    """Return the pixels of each cell of a grid over images, row by row."""
    height, width = _cell((images.shape[2], images.shape[3]), grid)
    cells = images.reshape(len(images), 3, grid[0], height, grid[1], width)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(len(images), grid[0] * grid[1], -1)


def _cell(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    if size[0] % grid[0] or size[1] % grid[1]:
        raise ConfigError(
            f"images of {size[0]} x {size[1]} pixels cannot be divided into the "
            f"{grid[0]} x {grid[1]} patches of the image tower, which masked pixels need"
        )
    return size[0] // grid[0], size[1] // grid[1]
