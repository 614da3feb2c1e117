"""Score a model on one retrieval benchmark: both directions, every language, with intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from vlm.distributed.groups import SINGLE, RankGroup
from vlm.embedding.bulk import BulkEmbedder
from vlm.embedding.embedder import Embedder
from vlm.evaluation.bootstrap import LEVEL
from vlm.evaluation.reading import Reading, reading_of
from vlm.evaluation.retrieval.comparison import Comparison, CosineStatistics, compare
from vlm.evaluation.retrieval.metrics import (
    CUTOFFS,
    Ranks,
    check_cutoffs,
    cross_lingual_agreement,
    intervals_of,
    scores_of,
)
from vlm.evaluation.retrieval.pairs import Question, RetrievalPairs, questions_of


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores, their intervals, and all that they depend on."""

    scores: Mapping[str, float]
    """What `evaluate_retrieval` returns."""
    intervals: Mapping[str, tuple[float, float]]
    """95 % bootstrap intervals of those scores that are means, under the same keys."""
    agreement: Mapping[str, Mapping[str, float | int]]
    """By a pair of languages such as `en/zh`, what `cross_lingual_agreement` returns, and the
    number of `translations` it was found with."""
    cosines: Mapping[str, CosineStatistics]
    """Of each language's texts with the images."""
    questions: Mapping[str, Question]
    """By language."""
    reading: Reading
    image_features: Float32[np.ndarray, "images dim"]
    """Unit vectors, in the order of the benchmark's images."""
    text_features: Mapping[str, Float32[np.ndarray, "texts dim"]]
    """By language."""
    ranks: Mapping[str, Ranks]
    """By language."""

    def as_record(self) -> dict[str, Any]:
        """Return all but features and ranks as plain dictionaries, for JSON."""
        return {
            "scores": dict(self.scores),
            "intervals": {"level": LEVEL, "of": dict(self.intervals)},
            "agreement": {pair: dict(found) for pair, found in self.agreement.items()},
            "cosines": {
                language: {
                    kind: {key: None if math.isnan(value) else value for key, value in each.items()}
                    for kind, each in asdict(found).items()
                }
                for language, found in self.cosines.items()
            },  # JSON cannot express NaN
            "questions": {
                language: {"fingerprint": question.fingerprint, **asdict(question)}
                for language, question in self.questions.items()
            },
            "reading": asdict(self.reading),
        }


def evaluate_retrieval(
    embedder: Embedder, pairs: RetrievalPairs, *, cutoffs: Sequence[int] = CUTOFFS,
    group: RankGroup = SINGLE, show_progress_bar: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Return recalls in [0, 1] under keys such as `zh/text_to_image/recall@1`.

    Each direction also has its median rank and mean reciprocal rank
    (`zh/text_to_image/median_rank`, `.../mrr`). `zh/mean_recall` is the mean of a language's
    recalls over all cutoffs and both directions, the usual MR. A query counts if at least one of
    its correct answers is among the first k; a wrong answer with an equal score comes first (see
    `vlm.evaluation.retrieval.metrics`). Ranks are exact, among all candidates.

    Args:
        embedder: The model.
        pairs: The benchmark.
        cutoffs: The k of the recalls, at least 1 each.
        group: Ranks that share the work; each must call this with the same arguments, and gets
            the same scores.
        show_progress_bar: Whether to show progress on stderr.

    Raises:
        VlmError: there are no cutoffs, or one is less than 1.
        DataError: an image cannot be read (on every rank).
    """
    check_cutoffs(cutoffs)
    bulk = BulkEmbedder(embedder, group=group, show_progress_bar=show_progress_bar)
    _, _, found = compare_pairs(bulk, pairs)
    return scores_of({language: each.ranks for language, each in found.items()}, cutoffs)


def evaluate_pairs(
    embedder: BulkEmbedder, pairs: RetrievalPairs, *, cutoffs: Sequence[int] = CUTOFFS
) -> Evaluation:
    """Score a model, with intervals, what was asked, and how the model read it.

    Every rank of the embedder's group must call this, and gets the whole.

    Raises:
        VlmError: as `evaluate_retrieval`.
        DataError: no caption of a language has a correct image, or an image cannot be read.
    """
    check_cutoffs(cutoffs)
    digests = embedder.digests_of(pairs.images)
    questions = questions_of(pairs, digests=digests)
    image_features, text_features, found = compare_pairs(embedder, pairs, digests=digests)
    ranks = {language: each.ranks for language, each in found.items()}
    texts = [text for of_language in pairs.texts.values() for text in of_language.texts]
    return Evaluation(
        scores=scores_of(ranks, cutoffs),
        intervals=intervals_of(ranks, pairs.texts, images=len(pairs.images), cutoffs=cutoffs),
        agreement=agreement_of(found, pairs, cutoffs=cutoffs),
        cosines={language: each.cosines for language, each in found.items()},
        questions=questions,
        reading=reading_of(embedder.embedder, texts),
        image_features=image_features,
        text_features=text_features,
        ranks=ranks,
    )


def compare_pairs(
    embedder: BulkEmbedder, pairs: RetrievalPairs, *, digests: Sequence[bytes] | None = None
) -> tuple[
    Float32[np.ndarray, "images dim"],
    dict[str, Float32[np.ndarray, "texts dim"]],
    dict[str, Comparison],
]:
    """Embed images and texts, and compare them, on the embedder's device and ranks.

    `digests` are what `embedder.digests_of` gave for the images, if known.

    Returns:
        The images' unit vectors; by language those of the texts, and the comparison.

    Raises:
        DataError: an image cannot be read.
    """
    images = embedder.encode_image(pairs.images, digests)
    texts = {language: embedder.encode_text(own.texts) for language, own in pairs.texts.items()}
    found = {
        language: compare(
            texts[language],
            images,
            own.matches,
            device=embedder.embedder.device,
            group=embedder.group,
            show_progress_bar=embedder.show_progress_bar,
        )
        for language, own in pairs.texts.items()
    }
    return images, texts, found


def agreement_of(
    found: Mapping[str, Comparison], pairs: RetrievalPairs, *, cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, dict[str, float | int]]:
    """Return how often a text and its translation find the same image, by pair of languages."""
    agreement: dict[str, dict[str, float | int]] = {}
    for languages, translations in pairs.translations.items():
        first, second = (
            (found[language].first_image[rows], found[language].text_to_image[rows])
            for language, rows in zip(languages, translations.T, strict=True)
        )
        ratios = cross_lingual_agreement(first, second, cutoffs=cutoffs)
        agreement["/".join(languages)] = {"translations": len(translations), **ratios}
    return agreement
