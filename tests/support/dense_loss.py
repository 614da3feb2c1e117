"""Contrastive losses by their definition: one process, whole matrices, nothing of `vlm`."""

from typing import Any, NamedTuple

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


class Term(NamedTuple):
    """Rows and columns to contrast; each has an image id, caption ids, and a sample's number."""

    weight: float
    rows: Any
    columns: Any
    row_keys: list
    column_keys: list


def bilingual_terms(
    images, texts, image_ids, caption_ids, *, together=False, weights=None, pair=(), pair_weight=0.0
):
    """Pick out sample by sample what each term contrasts; a caption id of -1 is no caption.

    `image_ids`, and `texts` and `caption_ids` by language, have a row for each sample.
    """
    ids = image_ids.tolist()
    captions = {name: own.tolist() for name, own in caption_ids.items()}
    samples = range(len(ids))

    def keys(rows, names):
        return [(ids[k], [captions[name][k] for name in names], k) for k in rows]

    terms = []
    if together:
        rows = [k for k in samples if any(own[k] >= 0 for own in captions.values())]
        columns = [(name, k) for name, own in captions.items() for k in samples if own[k] >= 0]
        chosen = [texts[name][k] for name, k in columns]
        stacked = torch.stack(chosen) if chosen else images[:0]
        column_keys = [(ids[k], [captions[name][k]], k) for name, k in columns]
        terms.append(Term(1.0, images[rows], stacked, keys(rows, captions), column_keys))
    else:
        for name, own in captions.items():
            rows = [k for k in samples if own[k] >= 0]
            both = keys(rows, [name])
            weight = (weights or {}).get(name, 1.0)
            terms.append(Term(weight, images[rows], texts[name][rows], both, both))
    if pair_weight:
        rows = [k for k in samples if all(captions[name][k] >= 0 for name in pair)]
        both = keys(rows, pair)
        terms.append(Term(pair_weight, *(texts[name][rows] for name in pair), both, both))
    return terms


def bilingual_definition(terms, kind, duplicates, scale, bias):
    """The weighted mean of terms; one that nothing takes part in is 0."""
    values = []
    for term in terms:
        own = torch.tensor([[i == j for *_, j in term.column_keys] for *_, i in term.row_keys])
        masks = {"positives": same(term.row_keys, term.column_keys)}
        if duplicates == "ignore":
            masks = {"positives": own, "ignored": masks["positives"] & ~own}
        if not len(term.rows):
            values.append(0 * scale)
        elif kind == "sigmoid":
            values.append(sigmoid_definition(term.rows, term.columns, scale, bias, **masks))
        else:
            values.append(softmax_definition(term.rows, term.columns, scale, **masks))
    total = sum(term.weight for term in terms)
    return sum(term.weight * each for term, each in zip(terms, values, strict=True)) / total


def same(row_keys, column_keys):
    """Say which pairs share an image id or any caption id, one pair at a time."""
    return torch.tensor(
        [
            [
                image == other or any(own in others and own != -1 for own in captions)
                for other, others, _ in column_keys
            ]
            for image, captions, _ in row_keys
        ]
    )
