"""Training batches in an order fixed by (seed, position), whatever the number of processes."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlm.data.config import CaptionConfig
from vlm.data.dataset import ShardedSplit
from vlm.data.sample import Batch, Sample
from vlm.errors import ConfigError
from vlm.images.decoding import decode_image
from vlm.images.transforms import TrainingTransform
from vlm.text.caption_ids import NO_CAPTION, text_id
from vlm.text.masking import word_mask
from vlm.text.tokenizer import Tokenizer

_SECOND = " second"
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GAMMA = np.array([0x9E3779B97F4A7C15], np.uint64)  # an array, whose products wrap in silence


@dataclass(frozen=True, kw_only=True)
class MaskPlan:
    """What of each example masked modelling hides."""

    text_ratio: float = 0.0
    """Ratio in [0, 1] of a main caption's tokens, whole words; 0 hides none."""
    image_ratio: float = 0.0
    """Ratio in [0, 1) of an image's patches; 0 hides none."""
    grid: tuple[int, int] = (1, 1)
    """Rows and columns of an image's patches."""


class ExampleKey(NamedTuple):
    """Names one example: everything random about it follows from the key and the seed."""

    epoch: int
    place: int
    """The sample's index in the split."""


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
    _decoded: dict[int, Image.Image] = field(default_factory=dict, init=False)

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
        image = self.transform(self._image(key.place, sample), rng)
        return Example(
            sample.uid, image, text_id(sample.concept), captions, seed=rng.getrandbits(63)
        )

    def _image(self, place: int, sample: Sample) -> Image.Image:
        if place in self._decoded:
            return self._decoded[place]
        image = decode_image(sample.image, name=f"{sample.uid} ({self.samples.address(place)})")
        if self.keep_decoded:
            self._decoded[place] = image
        return image


def second_of(language: str) -> str:
    """Return the name under which a language's second captions go through a batch and the loss."""
    return f"{language}{_SECOND}"


def choose_caption(sample: Sample, language: str, main_ratio: float, rng: random.Random) -> str:
    """Return the main caption or, as often as asked, one of the others; empty if there is none."""
    texts = sample.captions.get(language, ())
    if not texts:
        return ""
    main, others = texts[0], texts[1:]
    if rng.random() < main_ratio or not others:
        return main
    return rng.choice(others)


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
            if masks.text_ratio and not language.endswith(_SECOND)
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


@dataclass(frozen=True, slots=True)
class BatchOrder:
    """Which examples one rank reads, batch by batch.

    The samples of all epochs form one endless sequence; global batch `k` is its positions
    `[k * B, (k + 1) * B)`, of which rank `r` of `n` reads the `r`-th part. The state of the data
    is therefore one integer, the number of samples read, and does not depend on `n`.

    Raises:
        ConfigError: the batch is larger than the data, or no multiple of the process count.
    """

    size: int
    """Number of samples in an epoch."""
    global_batch_size: int
    """Samples that all ranks together read in one step."""
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.global_batch_size <= self.size:
            raise ConfigError(
                f"the batch has {self.global_batch_size} samples; expected 1 to {self.size}, "
                "the number of samples in the data"
            )
        if self.global_batch_size % self.world_size:
            raise ConfigError(
                f"the batch has {self.global_batch_size} samples; expected a multiple of "
                f"{self.world_size}, the number of processes"
            )

    def batches(self, *, first_sample: int, last_sample: int) -> Iterator[list[ExampleKey]]:
        """Give this rank's batches between two positions of the endless sequence."""
        local = self.global_batch_size // self.world_size
        for start in range(first_sample, last_sample, self.global_batch_size):
            first = start + self.rank * local
            places = (divmod(position, self.size) for position in range(first, first + local))
            yield [
                ExampleKey(epoch, int(epoch_order(self.size, seed=self.seed, epoch=epoch)[rest]))
                for epoch, rest in places
            ]


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def epoch_order(size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return a permutation of range(size) that depends on its arguments alone; seeds modulo 2**64.

    Every index is given a SplitMix64 hash (Steele, Lea and Flood 2014) of itself and of (seed,
    epoch), and the hashes are sorted: the same order in every process, numpy and torch version.
    """
    stream = _mix(_mix(np.array([seed % 2**64], np.uint64) + _GAMMA) + np.uint64(epoch) * _GAMMA)
    keys = _mix(np.arange(size, dtype=np.uint64) * _GAMMA + stream)
    return np.argsort(keys, kind="stable").astype(np.int64)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class TrainingLoader:
    """Gives one rank's batches from any position on."""

    examples: TrainingExamples
    order: BatchOrder
    tokenizer: Tokenizer
    workers: int
    """Processes that decode and augment; 0 does it in this process."""
    masks: MaskPlan | None = None
    """What masked modelling hides."""

    def read(self, *, first_sample: int, last_sample: int) -> Iterator[Batch]:
        """Give the batches between two positions of the endless sequence of samples."""
        loader: DataLoader[Example] = DataLoader(
            self.examples,
            batch_sampler=self.order.batches(first_sample=first_sample, last_sample=last_sample),
            num_workers=self.workers,
            collate_fn=partial(collate, tokenizer=self.tokenizer, masks=self.masks),
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)
