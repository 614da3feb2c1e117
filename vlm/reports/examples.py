"""Examples of what a model finds, and those of a benchmark, drawn at random."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64

from vlm.evaluation.retrieval.evaluation import Evaluation
from vlm.evaluation.retrieval.pairs import RetrievalPairs
from vlm.images.decoding import ImageSource

MISSED_BEYOND = 10
"""A query is missed if its first correct answer has a higher rank than this."""

_IMAGES, _CAPTIONS = 5, 3  # shown of what a query found
_SEED = 0
_ROUNDING = 1e-5  # float32 products of unit vectors are closer than this to the exact ones


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One image or text, as it is shown."""

    correct: bool = False
    cosine: float | None = None
    image: ImageSource | None = None
    text: str = ""
    """A caption or the name of a class; of an image, its address where that is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What is found in one language, best first."""

    language: str
    found: Sequence[Found]
    what: Literal["image", "caption", "class"] = "image"
    query: str = ""
    """The text that asks; empty where the example's image does."""
    rank: int | None = None
    """Of the first correct answer, 1 the best; None if the correct answers are unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """The same query in each language."""

    answers: Sequence[Answer]
    image: Found | None = None
    """The image that asks; None where texts do."""
    missed: Found | None = None
    """A correct image to show after the answers, if they miss it."""


def drawn_examples(
    pairs: RetrievalPairs, evaluation: Evaluation, *, of_each: int = 3
) -> dict[str, list[Example]]:
    """Draw at random queries that were answered, and queries that were missed.

    If the benchmark has translations, a query is a text and its translation. The examples, at most
    `of_each`, are by the title of their kind; kinds that do not occur are left out.
    """
    languages, queries = _queries(pairs)
    ranks = np.stack([
        evaluation.ranks[language]["text_to_image"][rows]
        for language, rows in zip(languages, queries.T, strict=True)
    ])  # fmt: skip
    examples = {
        title: [
            _text_example(pairs, evaluation, dict(zip(languages, rows, strict=True)))
            for rows in queries[_drawn(holds, of_each)].tolist()
        ]
        for title, holds in _kinds(ranks).items()
    }
    captioned = np.ones(len(pairs.images), bool)
    for language in languages:
        captioned &= np.isin(np.arange(len(captioned)), pairs.texts[language].matches[:, 1])
    examples["Images and the captions they find"] = [
        _image_example(pairs, evaluation, languages, image)
        for image in _drawn(captioned, of_each).tolist()
    ]
    return {title: drawn for title, drawn in examples.items() if drawn}


def _queries(
    pairs: RetrievalPairs,
) -> tuple[tuple[str, ...], Int64[np.ndarray, "queries languages"]]:
    """Return languages, and rows of texts with the same meaning in them, all with an answer."""
    answered = {
        language: np.isin(np.arange(len(own.texts)), own.matches[:, 0])
        for language, own in pairs.texts.items()
    }
    for languages, translations in pairs.translations.items():
        first, second = (answered[language] for language in languages)
        rows = translations[first[translations[:, 0]] & second[translations[:, 1]]]
        if len(rows):
            return languages, rows
    language = next(iter(pairs.texts))
    return (language,), np.flatnonzero(answered[language])[:, None]


def _kinds(
    ranks: Int64[np.ndarray, "languages queries"],
) -> Mapping[str, Bool[np.ndarray, " queries"]]:
    found, missed = ranks == 1, ranks > MISSED_BEYOND
    if len(ranks) == 1:
        return {"Found at rank 1": found[0], f"Not in the first {MISSED_BEYOND}": missed[0]}
    return {
        "Found at rank 1 in both languages": found.all(axis=0),
        f"Found at rank 1 in one language, not in the first {MISSED_BEYOND} in the other": (
            found.any(axis=0) & missed.any(axis=0)
        ),
        f"Not in the first {MISSED_BEYOND} in either language": missed.all(axis=0),
    }


def _drawn(holds: Bool[np.ndarray, " cases"], most: int) -> Int64[np.ndarray, " drawn"]:
    cases = np.flatnonzero(holds)
    drawn: Int64[np.ndarray, " drawn"] = np.random.default_rng(_SEED).permutation(cases)[:most]
    return drawn


def _text_example(
    pairs: RetrievalPairs, evaluation: Evaluation, rows: Mapping[str, int]
) -> Example:
    """Return what a text, and its translation, find; and a correct image if neither shows it."""
    answers, missed = [], None
    for language, row in rows.items():
        own, texts = pairs.texts[language], evaluation.text_features[language]
        correct = own.matches[own.matches[:, 0] == row, 1]
        best = _best(texts[row], evaluation.image_features, _IMAGES, correct)
        found = [
            image_of(pairs, place, correct=place in correct, cosine=cosine)
            for place, cosine in best
        ]
        rank = int(evaluation.ranks[language]["text_to_image"][row])
        answers.append(Answer(language=language, query=own.texts[row], found=found, rank=rank))
        missed = image_of(pairs, int(correct[0]), correct=True)
    shown = any(image.correct for answer in answers for image in answer.found)
    return Example(answers=answers, missed=None if shown else missed)


def _image_example(
    pairs: RetrievalPairs, evaluation: Evaluation, languages: Sequence[str], image: int
) -> Example:
    """Return which captions an image finds in each language."""
    answers = []
    for language in languages:
        own, texts = pairs.texts[language], evaluation.text_features[language]
        correct = own.matches[own.matches[:, 1] == image, 0]
        # There are ranks only for images with a caption, in the order of the images.
        place = np.searchsorted(np.unique(own.matches[:, 1]), image)
        best = _best(evaluation.image_features[image], texts, _CAPTIONS, correct)
        found = [
            Found(text=own.texts[row], correct=row in correct, cosine=cosine)
            for row, cosine in best
        ]
        rank = int(evaluation.ranks[language]["image_to_text"][place])
        answers.append(Answer(language=language, what="caption", found=found, rank=rank))
    return Example(image=image_of(pairs, image), answers=answers)


def image_of(
    pairs: RetrievalPairs, number: int, *, correct: bool = False, cosine: float | None = None
) -> Found:
    """Return an image of a benchmark as it is shown."""
    image = pairs.images[number]
    file = str(image) if isinstance(image, Path) else ""
    address = pairs.addresses[number] if pairs.addresses else file
    return Found(image=image, text=address, correct=correct, cosine=cosine)


def _best(
    query: Float32[np.ndarray, " dim"],
    candidates: Float32[np.ndarray, "candidates dim"],
    k: int,
    correct: Int[np.ndarray, " correct"],
) -> list[tuple[int, float]]:
    """Return the candidates with the highest cosines, best first, and the cosines.

    They are in the order of their ranks: wrong ones before correct ones with the same cosine.
    """
    k = min(k, len(candidates))
    rounded = candidates @ query
    near = np.flatnonzero(rounded >= np.partition(rounded, -k)[-k] - _ROUNDING)
    # Rounding in a matrix product depends on the row's place; in float64 equal vectors tie.
    cosines = (candidates[near].astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
    order = np.lexsort((near, np.isin(near, correct), -cosines))[:k]
    return list(zip(near[order].tolist(), cosines[order].tolist(), strict=True))
