"""Contrastive losses by their definition: one process, whole matrices, nothing of `vlm`."""

import torch
import torch.nn.functional as F


def softmax_definition(images, texts, scale, *, positives=None, ignored=None, smoothing=0.0):
    """Half the mean cross-entropy of the rows plus half that of the columns.

    `positives` and `ignored` are boolean matrices; without them a row's match is its own column.
    """
    logits = scale * images @ texts.T
    if positives is None:
        positives = torch.eye(len(images), dtype=torch.bool)
    seen = torch.ones_like(positives) if ignored is None else ~ignored
    logits = torch.where(seen, logits, -torch.inf)

    def mean_row_loss(logits, positives, seen):
        positives, candidates = positives.to(logits.dtype), seen.to(logits.dtype)
        target = (1 - smoothing) * positives / positives.sum(1, keepdim=True)
        target = target + smoothing * candidates / candidates.sum(1, keepdim=True)
        log_share = logits - logits.logsumexp(1, keepdim=True)
        return -(target * torch.where(seen, log_share, 0)).sum(1).mean()

    by_row = mean_row_loss(logits, positives, seen)
    return (by_row + mean_row_loss(logits.T, positives.T, seen.T)) / 2


def sigmoid_definition(images, texts, scale, bias, *, positives=None, ignored=None):
    """The pairwise logistic losses of all pairs, divided by the number of rows."""
    logits = scale * images @ texts.T + bias
    if positives is None:
        positives = torch.eye(len(images), dtype=torch.bool)
    losses = -F.logsigmoid(torch.where(positives, logits, -logits))
    if ignored is not None:
        losses = torch.where(ignored, 0, losses)
    return losses.sum() / len(images)


def matches(image_ids, caption_ids):
    """Say pair by pair which samples share an image id or a caption id; -1 is no caption."""
    rows = range(len(image_ids))
    return torch.tensor(
        [
            [
                bool(
                    image_ids[i] == image_ids[j]
                    or (caption_ids[i] == caption_ids[j] and caption_ids[i] != -1)
                )
                for j in rows
            ]
            for i in rows
        ]
    )
