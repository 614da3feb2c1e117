"""Score a model on a retrieval benchmark: both directions and every language, and how surely."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Float32

from vlm.distributed.groups import SINGLE, RankGroup
from vlm.embedding.bulk import BulkEmbedder
from vlm.embedding.embedder import Embedder
from vlm.evaluation.bootstrap import LEVEL
from vlm.evaluation.retrieval.cosines import CosineStatistics, cosine_statistics
from vlm.evaluation.retrieval.metrics import cross_lingual_agreement
from vlm.evaluation.retrieval.nearest import nearest
from vlm.evaluation.retrieval.pairs import RetrievalPairs
from vlm.evaluation.retrieval.protocol import Question, Reading, questions_of, reading_of
from vlm.evaluation.retrieval.ranks import exact_ranks_both
from vlm.evaluation.retrieval.scores import CUTOFFS, Ranks, check_cutoffs, intervals_of, scores_of


class _Comparing(TypedDict, total=False):
    """How vectors are compared."""

    device: torch.device
    group: RankGroup
    show_progress_bar: bool


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """What a model makes of a benchmark's images and texts: unit vectors, in their order."""

    images: Float32[np.ndarray, "images dim"]
    texts: Mapping[str, Float32[np.ndarray, "texts dim"]]
    """By language."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores, how far they can be trusted, and all that they depend on."""

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
    vectors: Vectors
    ranks: Mapping[str, Ranks]
    """By language."""

    def as_record(self) -> dict[str, Any]:
        """Return what is worth keeping as plain dictionaries, for JSON; not vectors and ranks."""
        return {
            "scores": dict(self.scores),
            "intervals": {"level": LEVEL, "of": dict(self.intervals)},
            "agreement": {pair: dict(found) for pair, found in self.agreement.items()},
            "cosines": {
                language: {kind: _without_nan(spread) for kind, spread in asdict(found).items()}
                for language, found in self.cosines.items()
            },
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

    Beside them are the median rank and the mean reciprocal rank of each direction
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
    vectors = embed_pairs(bulk, pairs)
    ranks = ranks_of(vectors, pairs, device=embedder.device, group=group)
    return scores_of(ranks, cutoffs)


def evaluate_with_protocol(
    embedder: BulkEmbedder, pairs: RetrievalPairs, *, cutoffs: Sequence[int] = CUTOFFS
) -> Evaluation:
    """Score a model, and say how sure that is, what was asked, and how the model read it.

    Every rank of the embedder's group must call this, and gets the whole.

    Args:
        embedder: The model.
        pairs: The benchmark.
        cutoffs: The k of the recalls, at least 1 each.

    Raises:
        VlmError: as `evaluate_retrieval`.
        DataError: a language has no right image at all, or an image cannot be read.
    """
    check_cutoffs(cutoffs)
    compared = _Comparing(
        device=embedder.embedder.device,
        group=embedder.group,
        show_progress_bar=embedder.show_progress_bar,
    )
    digests = embedder.digests_of(pairs.images)
    questions = questions_of(pairs, digests=digests)
    vectors = embed_pairs(embedder, pairs, digests=digests)
    ranks = ranks_of(vectors, pairs, **compared)
    texts = [text for of_language in pairs.texts.values() for text in of_language.texts]
    return Evaluation(
        scores=scores_of(ranks, cutoffs),
        intervals=intervals_of(ranks, pairs.texts, images=len(pairs.images), cutoffs=cutoffs),
        agreement=agreement_of(vectors, pairs, ranks, cutoffs=cutoffs, **compared),
        cosines={
            language: cosine_statistics(
                vectors.texts[language], vectors.images, of_language.matches, **compared
            )
            for language, of_language in pairs.texts.items()
        },
        questions=questions,
        reading=reading_of(embedder.embedder, texts),
        vectors=vectors,
        ranks=ranks,
    )


def embed_pairs(
    embedder: BulkEmbedder, pairs: RetrievalPairs, *, digests: Sequence[bytes] | None = None
) -> Vectors:
    """Embed a benchmark's images and texts.

    Args:
        embedder: The model.
        pairs: The benchmark.
        digests: What `embedder.digests_of` gave for the images, where it was asked already.

    Raises:
        DataError: an image cannot be read.
    """
    return Vectors(
        images=embedder.encode_image(pairs.images, digests),
        texts={
            language: embedder.encode_text(of_language.texts)
            for language, of_language in pairs.texts.items()
        },
    )


def ranks_of(
    vectors: Vectors, pairs: RetrievalPairs, **compared: Unpack[_Comparing]
) -> dict[str, Ranks]:
    """Return the exact ranks of both directions, by language.

    Args:
        vectors: What a model makes of the benchmark.
        pairs: The benchmark.
        compared: Where to multiply, by which ranks, and whether to show it, as for
            `exact_ranks_both`.
    """
    ranks: dict[str, Ranks] = {}
    for language, of_language in pairs.texts.items():
        text_to_image, image_to_text = exact_ranks_both(
            vectors.texts[language], vectors.images, of_language.matches, **compared
        )
        asked = np.unique(of_language.matches[:, 1])
        ranks[language] = {
            "text_to_image": text_to_image,
            "image_to_text": image_to_text[asked],
        }
    return ranks


def agreement_of(
    vectors: Vectors,
    pairs: RetrievalPairs,
    ranks: Mapping[str, Ranks],
    *,
    cutoffs: Sequence[int] = CUTOFFS,
    **compared: Unpack[_Comparing],
) -> dict[str, dict[str, float | int]]:
    """Return how often a text and its translation find the same image, by pair of languages.

    Args:
        vectors: What a model makes of the benchmark.
        pairs: The benchmark.
        ranks: What `ranks_of` returned.
        cutoffs: The k of `both@k`.
        compared: As for `ranks_of`.
    """
    found: dict[str, dict[str, float | int]] = {}
    first_image = {
        language: nearest(vectors.texts[language], vectors.images, **compared)
        for language in dict.fromkeys(sum(pairs.translations, ()))
    }
    for languages, translations in pairs.translations.items():
        sides = [
            (first_image[language][rows], ranks[language]["text_to_image"][rows])
            for language, rows in zip(languages, translations.T, strict=True)
        ]
        shares = cross_lingual_agreement(sides[0], sides[1], cutoffs=cutoffs)
        found["/".join(languages)] = {"translations": len(translations), **shares}
    return found


def _without_nan(spread: Mapping[str, float | int]) -> dict[str, float | int | None]:
    """JSON has no number that is none."""
    return {name: None if math.isnan(value) else value for name, value in spread.items()}
