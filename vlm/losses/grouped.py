"""The contrastive loss inside groups of ranks, one image-text term a language.

Convention, here and everywhere: the mean over ranks of the returned loss is the loss, and
averaging parameter gradients over ranks, as DDP does, gives its true gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vlm.distributed.gather import gather_rows
from vlm.distributed.groups import SINGLE, RankGroup
from vlm.errors import ConfigError
from vlm.losses.contrastive import multi_positive_cross_entropy, positive_pairs
from vlm.text.caption_ids import NO_CAPTION


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The contrastive loss of a run."""

    group_size: int | None = None
    """Ranks that contrast with each other; it divides their number. None is all of them."""
    second_weight: float = 1.0
    """Weight of a second caption's term beside a main caption's, at least 0."""

    def __post_init__(self) -> None:
        if self.second_weight < 0:
            raise ConfigError(f"second_weight is {self.second_weight}; expected at least 0")


class GroupedContrastiveLoss(nn.Module):
    """Symmetric cross-entropy between the pictures and the captions of a group of ranks.

    Every rank computes the rows of its own samples against the whole group's candidates: with
    `n` samples a rank and `g` ranks a group, logits of `n x g n` for each direction and language.
    A group of all ranks gives CLIP's loss on the global batch; smaller groups (M2-Encoder's
    grouped aggregation, Guo et al. 2024, section 3.3) contrast less and send less.

    Samples of one concept, and samples that share their caption, are positives of each other.
    A sample that lacks a language takes no part in that language's term.

    Args:
        group: The ranks to contrast with, from `vlm.distributed.groups.split_into_groups`.
        weights: Weight of a term by its language; 1 where it is not named.
    """

    def __init__(
        self, group: RankGroup = SINGLE, weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self.group = group
        self.weights = dict(weights or {})

    def forward(
        self,
        image_features: Float[Tensor, "local dim"],
        text_features: Mapping[str, Float[Tensor, "local dim"]],
        logit_scale: Float[Tensor, ""],
        image_ids: Int64[Tensor, " local"],
        caption_ids: Mapping[str, Int64[Tensor, " local"]],
    ) -> Float[Tensor, ""]:
        """Return this rank's share of the loss: the weighted mean of the languages' terms.

        Args:
            image_features: Unit vectors of this rank's pictures.
            text_features: By language, unit vectors of their captions.
            logit_scale: Inverse temperature, not its logarithm.
            image_ids: Equal for samples of the same concept.
            caption_ids: By language, equal for equal captions; `NO_CAPTION` for a missing one.
        """
        all_images = gather_rows(image_features, self.group)
        all_image_ids = gather_rows(image_ids, self.group)
        terms, weights = [], []
        for language, features in text_features.items():
            all_texts = gather_rows(features, self.group)
            all_caption_ids = gather_rows(caption_ids[language], self.group)
            present = all_caption_ids != NO_CAPTION
            positives = positive_pairs(
                image_ids, caption_ids[language], all_image_ids, all_caption_ids
            )
            image_to_text = multi_positive_cross_entropy(
                logit_scale * image_features @ all_texts.T, positives, present
            )
            text_to_image = multi_positive_cross_entropy(
                logit_scale * features @ all_images.T, positives, present
            )
            own = caption_ids[language] != NO_CAPTION
            rows = torch.where(own, (image_to_text + text_to_image) / 2, 0)
            # Dividing by the group's rows keeps the convention when ranks lack unequal numbers.
            weights.append(self.weights.get(language, 1.0))
            terms.append(weights[-1] * rows.sum() * self.group.size / present.sum().clamp(min=1))
        return torch.stack(terms).sum() / sum(weights)
