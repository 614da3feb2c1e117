"""What one training step reads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils._pytree import tree_map_only

from vlm.text.tokenizer import TokenBatch


class SkippedSample(NamedTuple):
    """A sample that could not be used; another one of its block took its place."""

    uid: str
    """Empty where the index of its shard cannot be read."""
    address: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one training step reads; row `i` of images and their ids belongs to sample `i`.

    A language has the captions that are there, and no others: row `i` of what it has belongs to
    sample `text_rows[language][i]`. A language that no sample has is a single text whose row is
    past the last sample: towers cannot run on nothing, and every rank must run every tower.
    """

    images: Float[Tensor, "batch 3 height width"]
    texts: Mapping[str, TokenBatch]
    """Per language, its captions: at most one a sample, and at least one text."""
    text_rows: Mapping[str, Int64[Tensor, " texts"]]
    """Per language, the sample of each text, from 0."""
    image_ids: Int64[Tensor, " batch"]
    """Equal where two images show the same concept."""
    caption_ids: Mapping[str, Int64[Tensor, " texts"]]
    """Per language, equal where two captions are the same text."""
    uids: tuple[str, ...]
    hidden_words: Mapping[str, Bool[Tensor, "texts length"]] = field(default_factory=dict)
    """Per language, true at tokens that masked modelling hides; empty where it hides none."""
    hidden_patches: Bool[Tensor, "batch patches"] | None = None
    """True at patches, row by row, that masked modelling hides; None where it hides none."""
    truncated: Mapping[str, int] = field(default_factory=dict)
    """Per language, how many of its captions are longer than the context; of a micro-batch, those
    of its whole batch."""
    skipped: tuple[SkippedSample, ...] = ()
    """What could not be used, and is replaced in this batch."""

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch with its tensors on `device`."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the same batch where a GPU copies from while it computes; torch's loader asks."""
        return self._moved(Tensor.pin_memory)

    def __reduce__(self) -> tuple[Any, ...]:
        """Send all but the images by value to another process.

        A tensor is sent as shared memory, which the reader asks the worker for: tensor by tensor,
        of a worker that is busy with the next batch.
        """
        others = {each.name: getattr(self, each.name) for each in fields(self)}
        images = others.pop("images")
        others["texts"] = {name: (each.ids, each.mask) for name, each in self.texts.items()}
        return _received, (images, tree_map_only(Tensor, Tensor.numpy, others))

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        texts = {language: each.moved(move) for language, each in self.texts.items()}
        return self._with(move, dict.fromkeys(self.texts, move), texts, self.uids)

    def split(self, number: int) -> list["Batch"]:
        """Return the batch in at most `number` parts of about equal size, for micro-batches.

        On a device this waits for it: a batch is split before it is moved.
        """
        size = -(-len(self.uids) // number)
        return [self._part(start, start + size) for start in range(0, len(self.uids), size)]

    def _part(self, first: int, last: int) -> "Batch":
        uids = self.uids[first:last]
        choose, text_rows = {}, {}
        for language, rows in self.text_rows.items():
            inside = (rows >= first) & (rows < last)
            # Where none is inside, any text stands for the language, past the last sample.
            chosen = inside.nonzero()[:, 0] if inside.any() else torch.zeros_like(rows[:1])
            choose[language] = itemgetter(chosen)
            text_rows[language] = torch.where(inside, rows - first, len(uids))[chosen]
        texts = {
            language: TokenBatch(choose[language](each.ids), choose[language](each.mask))
            for language, each in self.texts.items()
        }
        part = self._with(itemgetter(slice(first, last)), choose, texts, uids)
        hidden_words = {
            language: mask & (text_rows[language] < len(uids))[:, None]
            for language, mask in part.hidden_words.items()
        }
        return replace(part, text_rows=text_rows, hidden_words=hidden_words)

    def _with(
        self,
        of_samples: Callable[[Tensor], Tensor],
        of_texts: Mapping[str, Callable[[Tensor], Tensor]],
        texts: Mapping[str, TokenBatch],
        uids: tuple[str, ...],
    ) -> "Batch":
        """Return the batch with every tensor changed: those of samples, those of a language."""

        def change(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {language: of_texts[language](each) for language, each in tensors.items()}

        patches = self.hidden_patches
        return Batch(
            images=of_samples(self.images),
            texts=texts,
            text_rows=change(self.text_rows),
            image_ids=of_samples(self.image_ids),
            caption_ids=change(self.caption_ids),
            uids=uids,
            hidden_words=change(self.hidden_words),
            hidden_patches=None if patches is None else of_samples(patches),
            truncated=self.truncated,
            skipped=self.skipped,
        )


def _received(images: Tensor, others: Mapping[str, Any]) -> Batch:
    """Put together again what a batch was sent as."""
    tensors = tree_map_only(np.ndarray, torch.from_numpy, others)
    texts = {name: TokenBatch(*each) for name, each in tensors["texts"].items()}
    return Batch(**(tensors | {"images": images, "texts": texts}))
