"""Approximate search compared with exact search: what an index costs, in recall and in time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from vlm.evaluation.config import IndexPlan
from vlm.evaluation.retrieval.metrics import Ranks, first_correct_ranks, recall_at
from vlm.evaluation.search_cases import (
    BATCH,
    KS,
    MOST,
    SearchCase,
    ann_recall,
    answers,
    cases_of,
    milliseconds_per_query,
)
from vlm.search.index import AUTO, Hits, VectorIndex, check_factory, choose_factory

WARN_ABOVE = 0.01
"""Loss of R@1 beyond which `loss_of` says so."""

_MOST_TUNING = 1000
_TIMING = f"median of batches of {BATCH} queries, one thread, {MOST} answers"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What an index finds and costs in a case. Recalls are by k, ratios in [0, 1]."""

    factory: str
    search: str
    """The case's name, such as `zh text to image`."""
    direction: str
    language: str
    vectors: int
    dim: int
    exact_recall: Mapping[int, float]
    """R@k among all candidates; empty where there is no correct answer, like the next."""
    index_recall: Mapping[int, float]
    ann_recall: Mapping[int, float]
    """Ratio of the k nearest neighbours that the index found, of queries it was not tuned by."""
    milliseconds_per_query: float
    """Median of 15 batches of 32 queries for the largest k, on one thread."""
    exact_milliseconds_per_query: float
    bytes_per_vector: float
    build_seconds: float
    parameters: Mapping[str, int | float]
    """Search parameters that were set or found by tuning."""
    reached_target: bool
    """Whether the queries it was tuned by reached the target; true where it was not tuned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPoint:
    """Recall and time at one value of the search parameter; None for an index without one."""

    value: int | None
    ann_recall: float
    """At the largest k, over all queries."""
    recall_at_1: float | None
    milliseconds_per_query: float


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexReport:
    """What indexes find and cost, next to exact search."""

    plan: IndexPlan
    images: int
    dim: int
    comparisons: Sequence[Comparison]
    """By index, then by search."""
    curves: Mapping[str, Mapping[str, Sequence[SweepPoint]]]
    """By the names of the search and of the index, the points of a sweep; empty without one."""
    exact_milliseconds: Mapping[str, float]
    """By search, the time of an exact one a query."""

    @property
    def k(self) -> int:
        """The largest number of answers that was looked at; that of `ann_recall` in the curves."""
        return MOST

    @property
    def warnings(self) -> list[str]:
        """Return a sentence for each search in which an index costs recall or misses the target."""
        sentences = []
        for each in self.comparisons:
            if loss := loss_of(each):
                sentences.append(loss)
            if not each.reached_target:
                sentences.append(
                    f"no search parameter brings {each.factory} to a recall of "
                    f"{self.plan.target_recall} in {each.search}; what does best is used"
                )
        return sentences

    def as_record(self) -> dict[str, Any]:
        """Return it as plain dictionaries, for JSON."""
        return {
            "target_recall": self.plan.target_recall,
            "timing": _TIMING,
            "comparisons": [asdict(each) for each in self.comparisons],
            "sweep": {
                search: {name: [asdict(point) for point in line] for name, line in lines.items()}
                for search, lines in self.curves.items()
            },
        }


def check_factories(plan: IndexPlan, dim: int) -> None:
    """Refuse indexes that FAISS does not know for vectors of this width.

    Raises:
        SearchIndexError: as `check_factory`.
    """
    for factory in plan.factories:
        if factory != AUTO:
            check_factory(factory, dim)


def compare_indexes(
    images: Float32[np.ndarray, "images dim"],
    texts: Mapping[str, tuple[Float32[np.ndarray, "_ dim"], Int[np.ndarray, "_ 2"]]],
    plan: IndexPlan,
    *,
    ranks: Mapping[str, Ranks] | None = None,
    device: str | None = None,
) -> IndexReport:
    """Build indexes and compare them with exact search, in both directions of every language.

    Args:
        images: Unit vectors.
        texts: By language, unit vectors and the pairs (text, image) that belong together.
        plan: What to compare.
        ranks: By language, the exact ranks, where they are known.
        device: As for `VectorIndex.build`; exact ranks are found there as well.

    Raises:
        SearchIndexError: there is nothing to search with or in, FAISS cannot make an index, or
            none that `auto` knows fits into the memory.
    """
    cases = cases_of(images, texts, ranks=ranks, device=device)
    comparisons: list[Comparison] = []
    curves: dict[str, dict[str, list[SweepPoint]]] = {}
    for factory in plan.factories:
        built: dict[int, VectorIndex] = {}  # by the vectors: images are indexed once
        for case in cases:
            chosen, name = factory, factory
            if factory == AUTO:
                chosen = choose_factory(
                    *case.candidates.shape,
                    memory_budget_bytes=plan.memory_bytes,
                    target_recall=plan.target_recall,
                )
                name = f"{AUTO}: {chosen}"
            if id(case.candidates) not in built:
                index = VectorIndex.build(case.candidates, chosen, device=device)
                built[id(case.candidates)] = index
            index = built[id(case.candidates)]
            found = compare_with_exact(index, case, target_recall=plan.target_recall)
            comparisons.append(replace(found, factory=name))
            if plan.sweep:
                curves.setdefault(case.name, {})[comparisons[-1].factory] = sweep(index, case)
    return IndexReport(
        plan=plan,
        images=len(images),
        dim=images.shape[1],
        comparisons=comparisons,
        curves=curves,
        exact_milliseconds={case.name: case.exact_milliseconds for case in cases},
    )


def compare_with_exact(
    index: VectorIndex,
    case: SearchCase,
    *,
    target_recall: float | None = 0.95,
) -> Comparison:
    """Compare an index with exact search, after tuning it on half of the queries.

    Args:
        index: Holds the case's candidates.
        case: What is searched for.
        target_recall: Ratio of the ten nearest neighbours to which the search parameter is tuned,
            on up to 1000 queries; None for the index as it is.
    """
    rows = np.arange(len(case.queries))
    judged, reached = rows, True
    if target_recall is not None and index.tunable is not None:
        shuffled = np.random.default_rng(0).permutation(rows)
        half = min(len(rows) // 2, _MOST_TUNING)
        judged = shuffled[half:]
        tuning = shuffled[:half] if half else shuffled
        reached = index.tune(
            lambda: ann_recall(answers(index, case, rows=tuning), case, rows=tuning)[MOST],
            target=target_recall,
        )
    hits = answers(index, case, rows=rows)
    exact, approximate = {}, {}
    if case.matches is not None and case.ranks is not None:
        ranks = first_correct_ranks(hits.scores, hits.ids, case.matches)
        exact = {n: recall_at(case.ranks, n) for n in KS}
        approximate = {n: recall_at(ranks, n) for n in KS}
    return Comparison(
        factory=index.factory,
        search=case.name,
        direction=case.direction,
        language=case.language,
        vectors=len(index),
        dim=case.candidates.shape[1],
        exact_recall=exact,
        index_recall=approximate,
        ann_recall=ann_recall(Hits(hits.scores[judged], hits.ids[judged]), case, rows=judged),
        milliseconds_per_query=milliseconds_per_query(index, case.queries),
        exact_milliseconds_per_query=case.exact_milliseconds,
        bytes_per_vector=index.bytes_per_vector,
        build_seconds=index.build_seconds,
        parameters=dict(index.parameters),
        reached_target=reached,
    )


def sweep(index: VectorIndex, case: SearchCase) -> list[SweepPoint]:
    """Measure recall and time at powers of two of the search parameter, and at its highest.

    The parameter is left at its highest.
    """
    values: list[int | None] = [None]
    if index.tunable is not None:
        high = index.tunable.high
        values = [*(2**n for n in range(high.bit_length()) if 2**n < high), high]
    points, rows = [], np.arange(len(case.queries))
    for value in values:
        if value is not None and index.tunable is not None:
            index.set_parameter(index.tunable.name, value)
        hits = answers(index, case, rows=rows)
        recall = None
        if case.matches is not None:
            recall = recall_at(first_correct_ranks(hits.scores, hits.ids, case.matches), 1)
        points.append(
            SweepPoint(
                value=value,
                ann_recall=ann_recall(hits, case, rows=rows)[MOST],
                recall_at_1=recall,
                milliseconds_per_query=milliseconds_per_query(index, case.queries),
            )
        )
    return points


def loss_of(comparison: Comparison) -> str | None:
    """Return a sentence where an index costs more than a point of R@1."""
    if 1 not in comparison.exact_recall:
        return None
    exact, found = comparison.exact_recall[1], comparison.index_recall[1]
    if exact - found <= WARN_ABOVE + 1e-9:
        return None
    return (
        f"{comparison.factory} costs {100 * (exact - found):.1f} points of R@1 in "
        f"{comparison.search}: {found:.3f}, and {exact:.3f} by exact search"
    )


def comparison_rows(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """Return the header of a table, and a row for each index, direction and language.

    The first two columns are text.
    """
    header = [
        "factory", "search", "R@1 exact, index", "R@10 exact, index",
        "ann_recall@10", "ms exact, index", "bytes each", "build s", "parameters",
    ]  # fmt: skip
    return header, [_row(each) for each in comparisons]


def _row(each: Comparison) -> list[str]:
    recalls = [
        f"{each.exact_recall[k]:.3f}, {each.index_recall[k]:.3f}" if each.exact_recall else "-"
        for k in (1, 10)
    ]
    parameters = " ".join(f"{name}={value:g}" for name, value in each.parameters.items())
    return [
        each.factory, each.search, *recalls,
        f"{each.ann_recall[10]:.3f}",
        f"{each.exact_milliseconds_per_query:.4f}, {each.milliseconds_per_query:.4f}",
        f"{each.bytes_per_vector:.0f}", f"{each.build_seconds:.3f}", parameters or "-",
    ]  # fmt: skip
