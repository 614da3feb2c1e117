"""Scores as the rows of tables."""

from collections.abc import Mapping

from vlm.evaluation.retrieval.metrics import mean_recall
from vlm.evaluation.retrieval.scores import DIRECTIONS
from vlm.markdown import markdown_table

Interval = tuple[float, float]


def score_rows(
    scores: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, Mapping[str, Interval]] | None = None,
) -> tuple[list[str], list[list[str]]]:
    """Return a header and a row for each benchmark, language and direction; text in 3 columns.

    Args:
        scores: By benchmark, what `evaluate_retrieval` returned.
        intervals: By benchmark, what belongs behind some of these scores.
    """
    cutoffs = sorted(
        {int(key.rsplit("@", 1)[1]) for of_one in scores.values() for key in of_one if "@" in key}
    )
    header = ["benchmark", "language", "direction", *(f"R@{k}" for k in cutoffs), "MR"]
    header += ["median rank", "MRR"]
    rows = []
    for benchmark, of_one in scores.items():
        around = (intervals or {}).get(benchmark, {})
        for language in sorted({key.split("/")[0] for key in of_one}, reverse=True):
            for direction in DIRECTIONS:
                of_row = f"{language}/{direction}"
                names = [f"{of_row}/recall@{k}" for k in cutoffs]
                cells = [in_interval(of_one[name], around.get(name)) for name in names]
                cells.append(f"{mean_recall([of_one[name] for name in names]):.3f}")
                cells.append(f"{of_one[f'{of_row}/median_rank']:g}")
                cells.append(f"{of_one[f'{of_row}/mrr']:.3f}")
                rows.append([benchmark, language, direction.replace("_", " "), *cells])
    return header, rows


def format_scores(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Return a Markdown table with a row for each benchmark, language and direction.

    Args:
        scores: By benchmark, what `evaluate_retrieval` returned.
    """
    return markdown_table(*score_rows(scores), text_columns=3)


def in_interval(value: float, interval: Interval | None) -> str:
    """Return a share and, where it is known, half the width of its interval: `0.512 ±0.021`."""
    if interval is None:
        return f"{value:.3f}"
    return f"{value:.3f} ±{(interval[1] - interval[0]) / 2:.3f}"
