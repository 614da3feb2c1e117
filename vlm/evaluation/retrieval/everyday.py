"""Everyday questions: sentences as people type them, and the concepts that answer each."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Bool, Float32, Int64
from numpy.typing import NDArray

from vlm.embedding.bulk import BulkEmbedder
from vlm.errors import DataError
from vlm.evaluation.bootstrap import LEVEL, interval_of, resampled_means
from vlm.evaluation.retrieval.metrics import recall_by_chance

PART = "report"
"""The part of a file that is asked by default."""
SHOWN = 5
"""Images that are judged of what a question finds."""
_FEWEST = 10  # questions that have an interval


@dataclass(frozen=True, kw_only=True, slots=True)
class EverydayQuestion:
    """A question in several languages, each a translation of the others."""

    texts: Mapping[str, str]
    """By language."""
    answers: frozenset[str]
    """The concepts that answer it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EverydayAnswers:
    """What a model finds for everyday questions, and how much of that is right."""

    questions: Sequence[EverydayQuestion]
    """Those that an image answers."""
    left_out: int
    """Questions that no image answers."""
    found: Mapping[str, Int64[np.ndarray, "questions shown"]]
    """By language, the images that each question finds first, best first."""
    cosines: Mapping[str, Float32[np.ndarray, "questions shown"]]
    """Of the questions with those images."""
    correct: Mapping[str, Bool[np.ndarray, "questions shown"]]
    """Which of them are right."""
    scores: Mapping[str, float]
    """`zh/hit@1`, the ratio of questions whose first image is right; `zh/hit@5`, of those with a
    right one among the first five; `zh/precision@5`, the ratio of right images among these."""
    intervals: Mapping[str, tuple[float, float]]
    """95 % bootstrap intervals of the scores, over questions."""
    chance: Mapping[str, float]
    """What images in random order score in the mean, in any language: `hit@1`, ..."""
    fingerprint: str
    """Names what was asked: questions, answers, and which image shows what."""

    def as_record(self) -> dict[str, Any]:
        """Return the scores as plain dictionaries, for JSON."""
        return {
            "questions": len(self.questions),
            "left_out": self.left_out,
            "scores": dict(self.scores),
            "intervals": {"level": LEVEL, "of": dict(self.intervals)},
            "chance": dict(self.chance),
            "fingerprint": self.fingerprint,
        }


def read_questions(path: Path, *, part: str | None = None) -> list[EverydayQuestion]:
    """Read questions from a YAML file.

    The file is a list of mappings, or several lists by the name of a part: a mapping has the text
    in each language by its code, and `answers`, a list of concepts.

    Args:
        path: The file.
        part: Which list of several; by default `report`.

    Raises:
        DataError: the file cannot be read, has no such part, or a question lacks something.
    """
    try:
        held: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        found = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise DataError(f"cannot read questions from {path}: {found}") from error
    if isinstance(held, dict):
        name = part or PART
        if name not in held:
            raise DataError(f"{path} has no part {name!r}; found {', '.join(map(str, held))}")
        held = held[name]
    elif part:
        raise DataError(f"{path} has no parts; found part {part!r} to be asked for")
    if not isinstance(held, list) or not held:
        raise DataError(f"{path} holds no questions; expected a list of them, or lists by part")
    questions = [
        _question(each, f"question {place} of {path}") for place, each in enumerate(held, 1)
    ]
    languages = set(questions[0].texts)
    for place, question in enumerate(questions, 1):
        if set(question.texts) != languages:
            raise DataError(
                f"question {place} of {path} is in {', '.join(sorted(question.texts))}, the first "
                f"in {', '.join(sorted(languages))}; expected the same languages"
            )
    return questions


def _question(held: Any, name: str) -> EverydayQuestion:
    fields = dict(held) if isinstance(held, dict) else {}
    answers = fields.pop("answers", None)
    texts = {str(key): value for key, value in fields.items()}
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts.values()):
        raise DataError(f"{name} is {held}; expected its text by language")
    if not isinstance(answers, list) or not answers:
        raise DataError(f"{name} has the answers {answers}; expected a list of concepts")
    return EverydayQuestion(texts=texts, answers=frozenset(map(str, answers)))


def ask(
    embedder: BulkEmbedder,
    questions: Sequence[EverydayQuestion],
    *,
    concepts: Sequence[str],
    image_features: Float32[np.ndarray, "images dim"],
    languages: Sequence[str],
) -> EverydayAnswers:
    """Ask a model questions about images that it has embedded.

    A wrong image with the cosine of a right one comes before it.

    Args:
        embedder: The model; every rank of its group must call this.
        questions: What to ask.
        concepts: What each image shows.
        image_features: Unit vectors of the images.
        languages: The languages to ask in.

    Raises:
        DataError: no image answers any of the questions, or they are not in a language.
    """
    known = set(concepts)
    asked = [question for question in questions if question.answers & known]
    if not asked:
        raise DataError(
            f"none of {len(questions)} questions is answered by one of {len(concepts)} images; "
            "expected answers that are concepts of the samples"
        )
    if missing := [each for each in languages if each not in asked[0].texts]:
        raise DataError(
            f"the questions are in {', '.join(asked[0].texts)}; expected {' and '.join(missing)}"
        )
    shown = np.array(concepts)
    right = np.stack([np.isin(shown, list(question.answers)) for question in asked])
    found, cosines, correct = {}, {}, {}
    values: dict[str, NDArray[Any]] = {}
    for language in languages:
        texts = embedder.encode_text([question.texts[language] for question in asked])
        scores = texts.astype(np.float64) @ image_features.astype(np.float64).T
        order = np.lexsort((right, -scores.astype(np.float32)))[:, :SHOWN]
        found[language] = order
        cosines[language] = np.take_along_axis(scores, order, 1).astype(np.float32)
        correct[language] = np.take_along_axis(right, order, 1)
        values |= {
            f"{language}/hit@1": correct[language][:, 0],
            f"{language}/hit@{SHOWN}": np.any(correct[language], axis=1),
            f"{language}/precision@{SHOWN}": correct[language].mean(axis=1),
        }
    first = float(right.mean())
    return EverydayAnswers(
        questions=asked,
        left_out=len(questions) - len(asked),
        found=found,
        cosines=cosines,
        correct=correct,
        scores={name: float(np.mean(each)) for name, each in values.items()},
        intervals=_intervals(values),
        chance={
            "hit@1": first,
            f"hit@{SHOWN}": recall_by_chance(right.sum(axis=1), candidates=len(shown), k=SHOWN),
            f"precision@{SHOWN}": first,
        },
        fingerprint=_fingerprint(asked, concepts),
    )


def _intervals(values: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    questions = len(next(iter(values.values())))
    if questions < _FEWEST:
        return {}
    means = resampled_means(list(values.values()), [np.arange(questions)] * len(values))
    return {name: interval_of(row) for name, row in zip(values, means, strict=True)}


def _fingerprint(questions: Sequence[EverydayQuestion], concepts: Sequence[str]) -> str:
    asked = [[dict(question.texts), sorted(question.answers)] for question in questions]
    content = json.dumps([asked, list(concepts)], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]
