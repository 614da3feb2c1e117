"""The two records that cross the data room's walls: `Sample` and `Batch`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch with its tensors on `device`."""
        patches = self.hidden_patches
        return Batch(
            images=self.images.to(device, non_blocking=True),
            texts={language: tokens.to(device) for language, tokens in self.texts.items()},
            image_ids=self.image_ids.to(device),
            caption_ids={language: ids.to(device) for language, ids in self.caption_ids.items()},
            uids=self.uids,
            hidden_words={
                language: mask.to(device) for language, mask in self.hidden_words.items()
            },
            hidden_patches=None if patches is None else patches.to(device),
        )

    def split(self, number: int) -> list["Batch"]:
        """Return the batch in at most `number` parts of about equal size, for micro-batches."""
        size = -(-len(self.image_ids) // number)
        starts = range(0, len(self.image_ids), size)
        return [self._part(slice(start, start + size)) for start in starts]

    def _part(self, rows: slice) -> "Batch":
        patches = self.hidden_patches
        return Batch(
            images=self.images[rows],
            texts={
                language: TokenBatch(tokens.ids[rows], tokens.mask[rows])
                for language, tokens in self.texts.items()
            },
            image_ids=self.image_ids[rows],
            caption_ids={language: ids[rows] for language, ids in self.caption_ids.items()},
            uids=self.uids[rows],
            hidden_words={language: mask[rows] for language, mask in self.hidden_words.items()},
            hidden_patches=None if patches is None else patches[rows],
        )
