"""Examples to a batch: texts as tokens, and what masked modelling hides."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from vlm.data.examples import SECOND, Example
from vlm.data.sample import Batch
from vlm.errors import ConfigError
from vlm.text.caption_ids import NO_CAPTION, text_id
from vlm.text.masking import word_mask
from vlm.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class MaskPlan:
    """What of each example masked modelling hides."""

    text_ratio: float = 0.0
    """Ratio in [0, 1] of a main caption's tokens, whole words; 0 hides none."""
    image_ratio: float = 0.0
    """Ratio in [0, 1) of an image's patches; 0 hides none."""
    grid: tuple[int, int] = (1, 1)
    """Rows and columns of an image's patches."""


def collate(
    examples: Sequence[Example], *, tokenizer: Tokenizer, masks: MaskPlan | None = None
) -> Batch:
    """Stack examples; the texts of a language are padded to the longest of them."""
    masks = masks or MaskPlan()
    captions = {
        language: [example.captions[language] for example in examples]
        for language in examples[0].captions
    }
    tokens = {language: tokenizer.encode(texts) for language, texts in captions.items()}
    return Batch(
        images=torch.stack([example.image for example in examples]),
        texts=tokens,
        image_ids=torch.tensor([example.image_id for example in examples]),
        caption_ids={
            language: torch.tensor([text_id(text) if text else NO_CAPTION for text in texts])
            for language, texts in captions.items()
        },
        uids=tuple(example.uid for example in examples),
        hidden_words={
            language: word_mask(
                tokenizer,
                texts,
                tokens[language],
                masks.text_ratio,
                [random.Random(f"{example.seed}/{language}") for example in examples],
            )
            for language, texts in captions.items()
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
        skipped=tuple(each for example in examples for each in example.skipped),
    )


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
