"""Examples to a batch: texts as tokens, and what masked modelling hides."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.utils.data import default_collate

from vlm.batches.batch import Batch
from vlm.batches.examples import SECOND, Example
from vlm.errors import ConfigError
from vlm.text.caption_ids import text_id
from vlm.text.masking import word_mask
from vlm.text.tokenizer import TokenBatch, Tokenizer


@dataclass(frozen=True, kw_only=True)
class MaskPlan:
    """What of each example masked modelling hides."""

    text_ratio: float = 0.0
    """Ratio in [0, 1] of a main caption's tokens, whole words; 0 hides none."""
    image_ratio: float = 0.0
    """Ratio in [0, 1) of an image's patches; 0 hides none."""
    grid: tuple[int, int] = (1, 1)
    """Rows and columns of an image's patches."""


class _Caption(NamedTuple):
    """A caption of a batch."""

    row: int
    """Of its example."""
    text: str
    seed: int
    """Decides which of its words are hidden."""


def collate(
    examples: Sequence[Example], *, tokenizer: Tokenizer, masks: MaskPlan | None = None
) -> Batch:
    """Stack examples; the captions of a language are padded to the longest of them."""
    masks = masks or MaskPlan()
    captions = {language: _captions(examples, language) for language in examples[0].captions}
    texts = {language: [each.text for each in of] for language, of in captions.items()}
    tokens: dict[str, TokenBatch] = {}
    truncated: dict[str, int] = {}
    for language, each in texts.items():
        before = tokenizer.truncated
        tokens[language] = tokenizer.encode(each)
        truncated[language] = tokenizer.truncated - before
    return Batch(
        # In a worker straight into the memory that it shares with the process that trains.
        images=default_collate([example.image for example in examples]),
        texts=tokens,
        text_rows={
            language: torch.tensor([each.row for each in of]) for language, of in captions.items()
        },
        image_ids=torch.tensor([example.image_id for example in examples]),
        caption_ids={
            language: torch.tensor([text_id(text) for text in each])
            for language, each in texts.items()
        },
        uids=tuple(example.uid for example in examples),
        hidden_words={
            language: word_mask(
                tokenizer,
                texts[language],
                tokens[language],
                masks.text_ratio,
                [random.Random(f"{each.seed}/{language}") for each in of],
            )
            for language, of in captions.items()
            if masks.text_ratio and not language.endswith(SECOND)
        },
        # Each by its own seed, so that a batch in parts hides what the whole one does.
        hidden_patches=torch.cat(
            [
                draw_patches(1, masks.grid, ratio=masks.image_ratio, generator=generator)
                for generator in (torch.Generator().manual_seed(each.seed) for each in examples)
            ]
        )
        if masks.image_ratio
        else None,
        truncated=truncated,
        skipped=tuple(each for example in examples for each in example.skipped),
    )


def _captions(examples: Sequence[Example], language: str) -> list[_Caption]:
    """Return the captions that are there; an empty one past the last example if there are none."""
    there = [
        _Caption(row, each.captions[language], each.seed)
        for row, each in enumerate(examples)
        if each.captions[language]
    ]
    return there or [_Caption(len(examples), "", seed=0)]


def draw_patches(
    batch: int, grid: tuple[int, int], *, ratio: float, generator: torch.Generator
) -> Bool[Tensor, "batch patches"]:
    """Draw a ratio in [0, 1) of each image's patches, uniformly; True at the drawn ones."""
    if not 0 <= ratio < 1:
        raise ConfigError(f"the ratio of hidden patches is {ratio}; expected at least 0, below 1")
    patches = grid[0] * grid[1]
    order = torch.rand(batch, patches, generator=generator, device=generator.device).argsort(dim=1)
    # The places of numbers in a random order are a random order themselves.
    return order < round(ratio * patches)
