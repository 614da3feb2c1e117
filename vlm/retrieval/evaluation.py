"""Score a model on a retrieval benchmark: both directions, every language, one search each."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlm.embedder import Embedder
from vlm.errors import VlmError
from vlm.markdown import markdown_table
from vlm.retrieval.metrics import mean_recall, mean_reciprocal_rank, median_rank, recall_at
from vlm.retrieval.pairs import RetrievalPairs
from vlm.retrieval.protocol import Question, Reading, questions_of, reading_of
from vlm.retrieval.ranks import exact_ranks_both

CUTOFFS = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores, and all that they depend on."""

    scores: Mapping[str, float]
    """What `evaluate_retrieval` returns."""
    questions: Mapping[str, Question]
    """By language."""
    reading: Reading

    def as_record(self) -> dict[str, Any]:
        """Return it as plain dictionaries, for JSON."""
        return {
            "scores": dict(self.scores),
            "questions": {
                language: {"fingerprint": question.fingerprint, **asdict(question)}
                for language, question in self.questions.items()
            },
            "reading": asdict(self.reading),
        }


def evaluate_with_protocol(
    embedder: Embedder,
    pairs: RetrievalPairs,
    *,
    transform: Mapping[str, Any],
    cutoffs: Sequence[int] = CUTOFFS,
    show_progress_bar: bool = False,
) -> Evaluation:
    """Score a model and say what was asked of it, and how it read that.

    Args:
        embedder: The model.
        pairs: The benchmark.
        transform: open_clip's description of the picture transform.
        cutoffs: The k of the recalls, at least 1 each.
        show_progress_bar: Whether to show progress on stderr.

    Raises:
        VlmError: as `evaluate_retrieval`.
        DataError: a language has no right picture at all.
    """
    questions = questions_of(pairs)
    texts = [text for of_language in pairs.texts.values() for text in of_language.texts]
    return Evaluation(
        scores=evaluate_retrieval(
            embedder, pairs, cutoffs=cutoffs, show_progress_bar=show_progress_bar
        ),
        questions=questions,
        reading=reading_of(embedder, texts, transform),
    )


def evaluate_retrieval(
    embedder: Embedder, pairs: RetrievalPairs, *, cutoffs: Sequence[int] = CUTOFFS,
    show_progress_bar: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Return recalls in [0, 1] under keys such as `zh/text_to_image/recall@1`.

    Beside them are the median rank and the mean reciprocal rank of each direction
    (`zh/text_to_image/median_rank`, `.../mrr`). `zh/mean_recall` is the mean of a language's
    recalls over all cutoffs and both directions, the usual MR. A query counts if at least one of
    its correct answers is among the first k; a wrong answer with an equal score comes first (see
    `vlm.retrieval.metrics`). Ranks are exact, among all candidates.

    Raises:
        VlmError: there are no cutoffs, or one is less than 1.
    """
    if not cutoffs or min(cutoffs) < 1:
        raise VlmError(f"cutoffs are {list(cutoffs)}; expected numbers of at least 1")
    images = embedder.encode_image(pairs.images, show_progress_bar=show_progress_bar)
    scores: dict[str, float] = {}
    for language, of_language in pairs.texts.items():
        texts = embedder.encode_text(of_language.texts, show_progress_bar=show_progress_bar)
        text_to_image, image_to_text = exact_ranks_both(texts, images, of_language.matches)
        ranks = {
            "text_to_image": text_to_image,
            # A picture without a caption is a wrong answer, and no question.
            "image_to_text": image_to_text[np.unique(of_language.matches[:, 1])],
        }
        recalls = {
            f"{language}/{direction}/recall@{k}": recall_at(ranks[direction], k)
            for direction in DIRECTIONS
            for k in cutoffs
        }
        scores |= recalls
        scores[f"{language}/mean_recall"] = mean_recall(list(recalls.values()))
        for direction in DIRECTIONS:
            scores[f"{language}/{direction}/median_rank"] = median_rank(ranks[direction])
            scores[f"{language}/{direction}/mrr"] = mean_reciprocal_rank(ranks[direction])
    return scores


def format_scores(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Return a Markdown table with a row for each benchmark, language and direction.

    Args:
        scores: By benchmark, what `evaluate_retrieval` returned.
    """
    cutoffs = sorted(
        {int(key.rsplit("@", 1)[1]) for of_one in scores.values() for key in of_one if "@" in key}
    )
    header = ["benchmark", "language", "direction", *(f"R@{k}" for k in cutoffs), "MR"]
    rows = []
    for benchmark, of_one in scores.items():
        for language in sorted({key.split("/")[0] for key in of_one}, reverse=True):
            for direction in DIRECTIONS:
                recalls = [of_one[f"{language}/{direction}/recall@{k}"] for k in cutoffs]
                cells = [f"{value:.3f}" for value in [*recalls, mean_recall(recalls)]]
                rows.append([benchmark, language, direction.replace("_", " "), *cells])
    return markdown_table(header, rows, text_columns=3)
