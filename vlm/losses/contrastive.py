"""Contrastive losses as pure functions of similarity matrices."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vlm.text.caption_ids import NO_CAPTION


def positive_pairs(
    image_ids: Int64[Tensor, " rows"],
    caption_ids: Int64[Tensor, " rows"],
    other_image_ids: Int64[Tensor, " columns"],
    other_caption_ids: Int64[Tensor, " columns"],
) -> Bool[Tensor, "rows columns"]:
    """Say which pairs of samples match each other: the same concept, or the same caption."""
    same_concept = image_ids[:, None] == other_image_ids[None, :]
    same_caption = caption_ids[:, None] == other_caption_ids[None, :]
    return same_concept | (same_caption & (caption_ids != NO_CAPTION)[:, None])


def multi_positive_cross_entropy(
    logits: Float[Tensor, "rows columns"],
    positives: Bool[Tensor, "rows columns"],
    candidates: Bool[Tensor, " columns"],
) -> Float[Tensor, " rows"]:
    """Cross-entropy of each row against a target spread evenly over its positive candidates.

    With one positive a row this is CLIP's loss (Radford et al. 2021, figure 3); with several it
    is the image-text loss of UniCL (Yang et al. 2022, equations 4 and 5):
    `logsumexp_j z_ij - mean_{j in P(i)} z_ij`.

    Args:
        logits: Scaled similarities.
        positives: Which columns match a row.
        candidates: Which columns take part at all; the others are neither positive nor negative.

    Returns:
        One loss a row; zero for a row without a positive candidate.
    """
    positives = positives & candidates
    # The lowest finite number, because the gradient of a row of -inf would not be a number.
    logits = logits.masked_fill(~candidates, torch.finfo(logits.dtype).min)
    count = positives.sum(dim=1)
    matching = torch.where(positives, logits, 0).sum(dim=1) / count.clamp(min=1)
    return torch.where(count > 0, logits.logsumexp(dim=1) - matching, 0)
