"""Batches of plain vectors, for tests whose towers are matrices."""

import torch

from vlm.batches.batch import Batch
from vlm.text.caption_ids import NO_CAPTION
from vlm.text.tokenizer import TokenBatch


def batch_of_vectors(images, texts, ids, caption_ids):
    """Return a batch whose images and texts are rows of float64 matrices.

    Both have a row for each sample; a text whose caption id is `NO_CAPTION` is left out.
    """
    there = {
        name: (own != NO_CAPTION).nonzero()[:, 0].tolist() for name, own in caption_ids.items()
    }
    chosen = {name: rows or [0] for name, rows in there.items()}
    return Batch(
        images=images[:, None, None].expand(-1, 3, 1, -1),
        # The bits of the numbers stand for token ids.
        texts={
            name: TokenBatch(rows.view(torch.int64), torch.ones_like(rows, dtype=torch.bool))
            for name, rows in ((name, rows[chosen[name]]) for name, rows in texts.items())
        },
        text_rows={name: torch.tensor(rows or [len(ids)]) for name, rows in there.items()},
        image_ids=ids,
        caption_ids={name: own[chosen[name]] for name, own in caption_ids.items()},
        uids=tuple(map(str, ids.tolist())),
    )


def image_vectors(images):
    """Return the rows that a batch has as images."""
    return images[:, 0, 0]


def text_vectors(tokens):
    """Return the rows that a batch has as the tokens of a language."""
    return tokens.ids.view(torch.float64)


def rows_of(batch, rows):
    """Return some samples of a batch of vectors."""
    texts, caption_ids = captions_of(batch)
    return batch_of_vectors(
        image_vectors(batch.images)[rows],
        {name: each[rows] for name, each in texts.items()},
        batch.image_ids[rows],
        {name: ids[rows] for name, ids in caption_ids.items()},
    )


def captions_of(batch):
    """Return every sample's vector and caption id by language; zeros where it is absent."""
    texts, caption_ids = {}, {}
    for name, tokens in batch.texts.items():
        vectors, ids = text_vectors(tokens), batch.caption_ids[name]
        texts[name] = vectors.new_zeros(len(batch.image_ids), vectors.shape[1])
        caption_ids[name] = torch.full_like(batch.image_ids, NO_CAPTION)
        for text, row in enumerate(batch.text_rows[name].tolist()):
            if row < len(batch.image_ids):
                texts[name][row], caption_ids[name][row] = vectors[text], ids[text]
    return texts, caption_ids
