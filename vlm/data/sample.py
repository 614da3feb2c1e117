"""The two records that cross the data room's walls: `Sample` and `Batch`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vlm.text.tokenizer import TokenBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image with its captions, as stored in a shard."""

    uid: str
    """Unique name of the sample; also its key in the shard."""
    image: bytes
    """The encoded image (WebP, PNG or JPEG)."""
    captions: Mapping[str, Sequence[str]]
    """Captions by language code (`zh`, `en`, ...); the first of a language is its main caption."""
    concept: str
    """What the image shows: samples of one concept are never negatives of each other."""
    source: str = ""
    """Where the image comes from, for example the drawing style."""
    licence: str = ""
    """SPDX identifier of the image's licence."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Further labels, for example the class used in zero-shot classification."""
    address: str = field(default="", compare=False)
    """Where it was read from, `FOLDER/SHARD#ROW`; empty for a sample that is in no shard yet."""


class SkippedSample(NamedTuple):
    """A sample that could not be used; another one of its block took its place."""

    uid: str
    """Empty where not even its record could be read."""
    address: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one training step reads; row `i` of every tensor belongs to sample `i`."""

    images: Float[Tensor, "batch 3 height width"]
    texts: Mapping[str, TokenBatch]
    """One caption a sample for each language; an empty text where the language is missing."""
    image_ids: Int64[Tensor, " batch"]
    """Equal where two images show the same concept."""
    caption_ids: Mapping[str, Int64[Tensor, " batch"]]
    """Per language, equal where two captions are the same text; `NO_CAPTION` where missing."""
    uids: tuple[str, ...]
    hidden_words: Mapping[str, Bool[Tensor, "batch length"]] = field(default_factory=dict)
    """Per language, true at tokens that masked modelling hides; empty where it hides none."""
    hidden_patches: Bool[Tensor, "batch patches"] | None = None
    """True at patches, row by row, that masked modelling hides; None where it hides none."""
    skipped: tuple[SkippedSample, ...] = ()
    """What could not be used, and is replaced in this batch."""

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch with its tensors on `device`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True), self.uids)

    def split(self, number: int) -> list["Batch"]:
        """Return the batch in at most `number` parts of about equal size, for micro-batches."""
        size = -(-len(self.uids) // number)
        parts = [slice(start, start + size) for start in range(0, len(self.uids), size)]
        # itemgetter, not a lambda, which would see the last part only.
        return [self._with(itemgetter(rows), self.uids[rows]) for rows in parts]

    def _with(self, change: Callable[[Tensor], Tensor], uids: tuple[str, ...]) -> "Batch":
        """Return the batch with every tensor changed."""
        patches = self.hidden_patches
        return Batch(
            images=change(self.images),
            texts={
                name: TokenBatch(change(tokens.ids), change(tokens.mask))
                for name, tokens in self.texts.items()
            },
            image_ids=change(self.image_ids),
            caption_ids={name: change(ids) for name, ids in self.caption_ids.items()},
            uids=uids,
            hidden_words={name: change(mask) for name, mask in self.hidden_words.items()},
            hidden_patches=None if patches is None else change(patches),
        )
