"""Score a model on a retrieval benchmark: both directions, every language, one search each."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Int

from vlm.embedder import Embedder
from vlm.errors import VlmError
from vlm.retrieval.index import VectorIndex
from vlm.retrieval.metrics import first_correct_ranks, mean_recall, recall_at
from vlm.retrieval.pairs import RetrievalPairs

CUTOFFS = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")


def evaluate_retrieval(
    embedder: Embedder, pairs: RetrievalPairs, *, cutoffs: Sequence[int] = CUTOFFS,
    show_progress_bar: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Return recalls in [0, 1] under keys such as `zh/text_to_image/recall@1`.

    `zh/mean_recall` is the mean of a language's recalls over all cutoffs and both directions,
    the usual MR. A query counts if at least one of its correct answers is among the first k;
    a wrong answer with an equal score comes first (see `vlm.retrieval.metrics`).

    Raises:
        VlmError: there are no cutoffs, or one is less than 1.
    """
    if not cutoffs or min(cutoffs) < 1:
        raise VlmError(f"cutoffs are {list(cutoffs)}; expected numbers of at least 1")
    images = embedder.encode_image(pairs.images, show_progress_bar=show_progress_bar)
    image_index = VectorIndex.build(images)
    scores: dict[str, float] = {}
    for language, of_language in pairs.texts.items():
        texts = embedder.encode_text(of_language.texts, show_progress_bar=show_progress_bar)
        matches = of_language.matches
        with_text = np.unique(matches[:, 1])
        ranks = {
            "text_to_image": search_ranks(image_index, texts, matches, max(cutoffs)),
            "image_to_text": search_ranks(
                VectorIndex.build(texts), images, matches[:, ::-1], max(cutoffs)
            )[with_text],
        }
        recalls = {
            f"{language}/{direction}/recall@{k}": recall_at(ranks[direction], k)
            for direction in DIRECTIONS
            for k in cutoffs
        }
        scores |= recalls
        scores[f"{language}/mean_recall"] = mean_recall(list(recalls.values()))
    return scores


def search_ranks(
    index: VectorIndex,
    queries: Float32[np.ndarray, "queries dim"],
    matches: Int[np.ndarray, "matches 2"],
    max_rank: int,
) -> Int[np.ndarray, " queries"]:
    """Return the rank of each query's best correct answer; ranks past `max_rank` may be larger."""
    most_correct = int(np.bincount(matches[:, 0]).max(initial=0))
    hits = index.search(queries, max_rank + most_correct)
    return first_correct_ranks(hits.scores, hits.ids, matches)


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
    return markdown_table(header, rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up in plain text as well."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )
