"""What a retrieval evaluation asks: pictures, texts by language, and which belong together."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from vlm.data.benchmarks.benchmark import Benchmark, DuplicatePolicy, correct_pairs
from vlm.data.dataset import ShardedSplit
from vlm.data.sample import Sample
from vlm.errors import DataError
from vlm.images.decoding import ImageSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """The texts of one language."""

    texts: Sequence[str]
    matches: Int[np.ndarray, "matches 2"]
    """Pairs (text, picture) that belong together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalPairs:
    """A retrieval benchmark."""

    images: Sequence[ImageSource]
    """Encoded pictures, or where they lie."""
    texts: Mapping[str, Texts]
    """The texts by language code."""
    duplicates: DuplicatePolicy = "by id"
    """Which pictures are right where several have the same text."""
    cleaning: str = "none"
    """What was done to the texts."""


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
    return RetrievalPairs(
        images=[sample.image for sample in samples], texts=texts, duplicates="by string"
    )


def pairs_of_benchmark(
    benchmark: Benchmark,
    *,
    duplicates: DuplicatePolicy = "by id",
    lower_case: bool = False,
    languages: Sequence[str] = (),
) -> RetrievalPairs:
    """Make the questions of a benchmark's files.

    Args:
        benchmark: The pictures and captions.
        duplicates: Which pictures are right where several have the same caption.
        lower_case: Whether captions are brought to lower case first, as Chinese-CLIP's and
            M2-Encoder's evaluations do, which also write “ and ” as plain quotation marks.
        languages: The languages to ask in; none for all.

    Raises:
        DataError: the benchmark has no captions in a language that is asked for.
    """
    missing = [language for language in languages if language not in benchmark.captions]
    if missing:
        raise DataError(
            f"{benchmark.name} has captions in {', '.join(benchmark.captions)}; expected "
            f"{', '.join(missing)} as well"
        )
    texts = {
        language: Texts(
            texts=[_lowered(text) for text in captions.texts] if lower_case else captions.texts,
            matches=correct_pairs(captions, duplicates),
        )
        for language, captions in benchmark.captions.items()
        if not languages or language in languages
    }
    cleaning = [benchmark.cleaning] if benchmark.cleaning != "none" else []
    cleaning += ["lower case, plain quotation marks"] if lower_case else []
    return RetrievalPairs(
        images=benchmark.images,
        texts=texts,
        duplicates=duplicates,
        cleaning="; ".join(cleaning) or "none",
    )


def _lowered(text: str) -> str:
    return text.lower().replace("“", '"').replace("”", '"')


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
