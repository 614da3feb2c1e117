"""Batches of plain vectors, for tests whose towers are matrices."""

import torch

from vlm.data.sample import Batch
from vlm.text.tokenizer import TokenBatch


def batch_of_vectors(images, texts, ids, caption_ids):
    """Return a batch whose images and texts are rows of float64 matrices."""
    return Batch(
        images=images[:, None, None].expand(-1, 3, 1, -1),
        # The bits of the numbers stand for token ids.
        texts={
            name: TokenBatch(rows.view(torch.int64), torch.ones_like(rows, dtype=torch.bool))
            for name, rows in texts.items()
        },
        image_ids=ids,
        caption_ids=caption_ids,
        uids=tuple(map(str, ids.tolist())),
    )


def image_vectors(images):
    """Return the rows that a batch has as images."""
    return images[:, 0, 0]


def text_vectors(tokens):
    """Return the rows that a batch has as the tokens of a language."""
    return tokens.ids.view(torch.float64)


def rows_of(batch, rows):
    """Return some rows of a batch of vectors."""
    return batch_of_vectors(
        image_vectors(batch.images)[rows],
        {name: text_vectors(tokens)[rows] for name, tokens in batch.texts.items()},
        batch.image_ids[rows],
        {name: ids[rows] for name, ids in batch.caption_ids.items()},
    )
