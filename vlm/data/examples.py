"""One sample as a training step sees it: its captions chosen and its image augmented."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vlm.data.config import CaptionConfig
from vlm.data.dataset import ShardedSplit
from vlm.data.order import ExampleKey
from vlm.data.sample import Sample
from vlm.images.transforms import TrainingTransform
from vlm.text.caption_ids import text_id

SECOND = " second"


@dataclass(frozen=True, slots=True)
class Example:
    """One sample as it enters a batch."""

    uid: str
    image: Float[Tensor, "3 height width"]
    image_id: int
    captions: Mapping[str, str]
    """By language, and by `second_of` it where a second caption is read."""
    seed: int
    """Decides what of it is hidden."""


@dataclass(eq=False)
class TrainingExamples(Dataset[Example]):
    """Samples with a caption chosen for each language and their image augmented.

    Caption choice, augmentation and what is hidden are a function of (seed, epoch, uid).
    """

    samples: ShardedSplit
    transform: TrainingTransform
    captions: CaptionConfig
    seed: int
    keep_decoded: bool = False
    """Whether each process keeps the images it has decoded."""
    _decoded: dict[int, dict[int, Image.Image]] = field(default_factory=dict, init=False)
    """By place and scale."""

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: ExampleKey) -> Example:
        sample = self.samples[key.place]
        rng = random.Random(f"{self.seed}/{key.epoch}/{sample.uid}")
        captions = {
            language: choose_caption(sample, language, self.captions.main_ratio, rng)
            for language in self.captions.languages
        }
        if self.captions.second:
            captions |= {
                second_of(language): choose_caption(sample, language, 0.0, rng)
                for language in self.captions.languages
            }
        name = f"{sample.uid} ({self.samples.address(key.place)})"
        kept = self._decoded.setdefault(key.place, {}) if self.keep_decoded else None
        image = self.transform.decode(sample.image, rng, name=name, kept=kept)
        return Example(
            sample.uid, image, text_id(sample.concept), captions, seed=rng.getrandbits(63)
        )


def second_of(language: str) -> str:
    """Return the name under which a language's second captions go through a batch and the loss."""
    return f"{language}{SECOND}"


def choose_caption(sample: Sample, language: str, main_ratio: float, rng: random.Random) -> str:
    """Return the main caption or, as often as asked, one of the others; empty if there is none."""
    texts = sample.captions.get(language, ())
    if not texts:
        return ""
    main, others = texts[0], texts[1:]
    if rng.random() < main_ratio or not others:
        return main
    return rng.choice(others)
