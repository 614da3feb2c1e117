"""What a retrieval evaluation asks: pictures, texts by language, and which belong together."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from vlm.data.dataset import ShardedSplit
from vlm.data.sample import Sample
from vlm.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """The texts of one language."""

    texts: Sequence[str]
    matches: Int[np.ndarray, "matches 2"]
    """Pairs (text, picture) that belong together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalPairs:
    """A retrieval benchmark."""

    images: Sequence[bytes]
    """Encoded pictures."""
    texts: Mapping[str, Texts]
    """The texts by language code."""


def pairs_of_split(
    folder: Path, split: str, *, languages: Sequence[str], where: Sequence[str] = ()
) -> RetrievalPairs:
    """Make a benchmark of a data folder's split.

    Each concept is asked for once by its main caption in each language; all its pictures are
    correct answers, and its caption is the correct answer for each of them.

    Args:
        folder: A data folder with a manifest.
        split: Name of the split.
        languages: The languages to ask in; those that no sample has are left out.
        where: Conditions such as `source=noto` or `group!=flags` that samples must meet.

    Raises:
        DataError: the split cannot be read, a condition is not one, or nothing is left.
    """
    conditions = [parse_condition(text) for text in where]
    samples = [
        sample for sample in ShardedSplit(folder, split) if all(c(sample) for c in conditions)
    ]
    texts = {language: _texts_of(samples, language) for language in languages}
    texts = {language: of_language for language, of_language in texts.items() if of_language.texts}
    if not texts:
        raise DataError(
            f"the split {split!r} of {folder} has no sample with a caption in "
            f"{' or '.join(languages)}" + (f" where {' and '.join(where)}" if where else "")
        )
    return RetrievalPairs(images=[sample.image for sample in samples], texts=texts)


def parse_condition(text: str) -> Callable[[Sample], bool]:
    """Read `KEY=VALUE` or `KEY!=VALUE`; the key is `source`, `concept` or one of the labels.

    Raises:
        DataError: the text is no such condition.
    """
    key, sign, value = text.partition("=")
    compare = operator.ne if key.endswith("!") else operator.eq
    key = key.removesuffix("!")
    if not (key and sign and value):
        raise DataError(f"{text!r} is not a condition; expected KEY=VALUE or KEY!=VALUE")

    def holds(sample: Sample) -> bool:
        own = {"source": sample.source, "concept": sample.concept, **sample.labels}
        return bool(compare(own.get(key, ""), value))

    return holds


def _texts_of(samples: Sequence[Sample], language: str) -> Texts:
    of_concept: dict[str, int] = {}
    of_text: dict[str, int] = {}  # concepts that share their caption share their question
    matches = []
    for image, sample in enumerate(samples):
        captions = sample.captions.get(language)
        if not captions:
            continue
        if sample.concept not in of_concept:
            of_concept[sample.concept] = of_text.setdefault(captions[0], len(of_text))
        matches.append((of_concept[sample.concept], image))
    return Texts(texts=list(of_text), matches=np.array(matches, dtype=np.int64).reshape(-1, 2))
