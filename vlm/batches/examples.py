"""One sample as a training step sees it: its captions chosen and its image augmented."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from vlm.batches.batch import SkippedSample
from vlm.batches.config import SLOT, CaptionConfig
from vlm.batches.order import SampleKey, SourceOrder
from vlm.data.sample import Sample
from vlm.data.source import Source
from vlm.errors import DataError
from vlm.images.decoding import EncodedImage
from vlm.images.transforms import TrainingTransform
from vlm.text.caption_ids import text_id

SECOND = " second"
_ATTEMPTS = 16  # each finds a usable sample but where most of a block is damaged


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
    skipped: tuple[SkippedSample, ...] = ()
    """What it came in the place of."""


@dataclass(eq=False)
class TrainingExamples(Dataset[Example]):
    """Samples with a caption chosen for each language and their image augmented.

    Caption choice, augmentation and what is hidden are a function of (seed, epoch, uid). In the
    place of a sample that cannot be used comes another one of its block, by a hash of its place in
    the order: every run, and a resumed one, takes the same.
    """

    sources: Sequence[Source]
    orders: Sequence[SourceOrder]
    """Find substitutes; one a source."""
    transform: TrainingTransform
    captions: CaptionConfig
    seed: int
    keep_decoded: bool = False
    """Whether each process keeps the samples it has read, with their decoded images."""
    languages: Sequence[Sequence[str]] = ()
    """Of each source, those of `captions` that are read; none for all."""
    _kept: dict[tuple[int, int, int], tuple[Sample, EncodedImage]] = field(
        default_factory=dict, init=False
    )
    """By source, shard and row."""

    def prefetch(self, keys: Iterable[SampleKey]) -> None:
        """Begin to fetch remote shards of some samples, and those that their streams read next."""
        last = {(key.source, key.stream): key for key in keys}
        for number, source in enumerate(self.sources):
            order = self.orders[number]
            shards = (order.shards_from(key) for key in last.values() if key.source == number)
            source.prefetch(chain.from_iterable(shards))

    def __getitem__(self, key: SampleKey) -> Example:
        return self.sized(key, self.transform.image_size)

    def sized(self, key: SampleKey, image_size: int) -> Example:
        """Return a sample with an image of another size, in pixels; all else is the same."""
        skipped: list[SkippedSample] = []
        substitute = key
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return replace(self._example(substitute, image_size), skipped=tuple(skipped))
            except DataError as error:  # not MemoryError and the like, which are not the sample's
                source, where = self.sources[key.source], (substitute.shard, substitute.row)
                skipped.append(
                    SkippedSample(source.uid(*where), source.address(*where), str(error))
                )
                substitute = self.orders[key.source].substitute(key, attempt)
        raise DataError(
            f"{skipped[0].address} and {_ATTEMPTS - 1} samples in its place cannot be used; the "
            f"last: {skipped[-1].reason}"
        )

    def _read(self, key: SampleKey) -> tuple[Sample, EncodedImage]:
        """Return a sample and its image, which keeps its pixels once they are decoded."""
        place = (key.source, key.shard, key.row)
        if place in self._kept:
            return self._kept[place]
        sample = self.sources[key.source].at(key.shard, key.row)
        found = sample, EncodedImage(sample.image, name=f"{sample.uid} ({sample.address})")
        if self.keep_decoded:
            self._kept[place] = found
        return found

    def _example(self, key: SampleKey, image_size: int) -> Example:
        sample, image = self._read(key)
        rng = random.Random(f"{self.seed}/{key.epoch}/{sample.uid}")
        own = self.languages[key.source] if self.languages else ()
        read = own or self.captions.languages
        if not any(sample.captions.get(language) for language in read):
            raise DataError(
                f"{sample.uid} ({sample.address}) has no caption in {' or '.join(read)}, only "
                f"in {', '.join(sample.captions) or 'no language'}"
            )
        ratios = {"": self.captions.main_ratio} | ({SECOND: 0.0} if self.captions.second else {})
        captions = {
            # What is not read is absent; every batch has the same names.
            f"{language}{which}": choose_caption(
                sample, language, self.captions, rng, main_ratio=main_ratio
            )
            if language in read
            else ""
            for which, main_ratio in ratios.items()
            for language in self.captions.languages
        }
        pixels = self.transform.resized(image_size).decode(image, rng)
        return Example(
            sample.uid, pixels, text_id(sample.concept), captions, seed=rng.getrandbits(63)
        )


def second_of(language: str) -> str:
    """Return the name under which a language's second captions go through a batch and the loss."""
    return f"{language}{SECOND}"


def caption_names(languages: Sequence[str]) -> dict[str, str]:
    """Return the language of each name under which a batch may have captions."""
    return {name: language for language in languages for name in (language, second_of(language))}


def choose_caption(
    sample: Sample, language: str, config: CaptionConfig, rng: random.Random, *, main_ratio: float
) -> str:
    """Return the main caption or, as often as asked, one of the others or a composed one.

    The text is empty where the sample has no caption in the language.
    """
    texts = sample.captions.get(language, ())
    if not texts:
        return ""
    main, others = texts[0], texts[1:]
    templates = config.templates.get(language, ())
    if rng.random() < main_ratio or not (others or templates):
        return main
    if templates and rng.random() < config.composed_ratio:
        tried = (
            composed(template, language, sample.captions, rng)
            for template in rng.sample(templates, len(templates))
        )
        return next(filter(None, tried), main)
    return rng.choice(others or texts)


def composed(
    template: str, language: str, captions: Mapping[str, Sequence[str]], rng: random.Random
) -> str:
    """Return a template with a different caption in each of its slots; empty if there are fewer."""
    parts = SLOT.split(template)  # every second one is a slot's language, empty for its own
    slots = [slot or language for slot in parts[1::2]]
    needed = Counter(slots)
    if any(number > len(captions.get(of, ())) for of, number in needed.items()):
        return ""
    drawn = {of: rng.sample(captions[of], number) for of, number in needed.items()}
    parts[1::2] = [drawn[of].pop() for of in slots]
    return "".join(parts)
