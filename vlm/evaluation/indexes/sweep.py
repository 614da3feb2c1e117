"""Approximate search beside exact search: what an index costs, in recall and in time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from vlm.evaluation.indexes.cases import SearchCase, ann_recall, answers, milliseconds_per_query
from vlm.evaluation.retrieval.metrics import first_correct_ranks, recall_at
from vlm.search.approximate import ApproximateIndex, build_index
from vlm.search.index import Hits
from vlm.search.index_choice import AUTO, choose_factory, smallest_reaching

WARN_ABOVE = 0.01
"""Loss of R@1 beyond which `loss_of` says so."""

_MOST_TUNING = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What an index makes of a case. Recalls are by k, shares in [0, 1]."""

    factory: str
    search: str
    """The case's name, such as `zh text to image`."""
    direction: str
    language: str
    vectors: int
    dim: int
    exact_recall: Mapping[int, float]
    """R@k among all candidates; empty where nothing is right, like the next."""
    index_recall: Mapping[int, float]
    ann_recall: Mapping[int, float]
    """Share of the k nearest neighbours that the index found, of queries it was not tuned by."""
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
    """One value of the search parameter; None for an index that has none."""

    value: int | None
    ann_recall: float
    """At the largest k, over all queries."""
    recall_at_1: float | None
    milliseconds_per_query: float


def compare(
    index: ApproximateIndex,
    case: SearchCase,
    *,
    ks: Sequence[int] = (1, 5, 10),
    target_recall: float | None = 0.95,
    seed: int = 0,
) -> Comparison:
    """Put an index beside exact search, after tuning it on half of the queries.

    Args:
        index: Holds the case's candidates.
        case: Made with the same `ks`.
        ks: The numbers of answers to look at.
        target_recall: Share of the neighbours at the largest k at which the search parameter is
            left; None for the index as it is.
        seed: Decides the half that is tuned by, up to 1000 queries.
    """
    k, rows = max(ks), np.arange(len(case.queries))
    judged, reached = rows, True
    if target_recall is not None and index.tunable is not None:
        shuffled = np.random.default_rng(seed).permutation(rows)
        half = min(len(rows) // 2, _MOST_TUNING)
        judged = shuffled[half:]
        tuning = shuffled[:half] if half else shuffled
        reached = _tune(index, case, tuning, k=k, target=target_recall)
    hits = answers(index, case, k, rows=rows)
    exact, approximate = {}, {}
    if case.matches is not None and case.ranks is not None:
        ranks = first_correct_ranks(hits.scores, hits.ids, case.matches)
        exact = {n: recall_at(case.ranks, n) for n in ks}
        approximate = {n: recall_at(ranks, n) for n in ks}
    return Comparison(
        factory=index.factory,
        search=case.name,
        direction=case.direction,
        language=case.language,
        vectors=len(index),
        dim=case.candidates.shape[1],
        exact_recall=exact,
        index_recall=approximate,
        ann_recall=ann_recall(Hits(hits.scores[judged], hits.ids[judged]), case, ks, rows=judged),
        milliseconds_per_query=milliseconds_per_query(index, case.queries, k),
        exact_milliseconds_per_query=case.exact_milliseconds,
        bytes_per_vector=index.bytes_per_vector,
        build_seconds=index.build_seconds,
        parameters=index.parameters,
        reached_target=reached,
    )


def sweep(index: ApproximateIndex, case: SearchCase, *, k: int = 10) -> list[SweepPoint]:
    """Measure recall and time at powers of two of the search parameter, and at its highest.

    The parameter is left at its highest.

    Args:
        index: Holds the case's candidates.
        case: Made for this `k` at least.
        k: The number of neighbours to look for.
    """
    values: list[int | None] = [None]
    if index.tunable is not None:
        high = index.tunable.high
        values = [*(2**n for n in range(high.bit_length()) if 2**n < high), high]
    points, rows = [], np.arange(len(case.queries))
    for value in values:
        if value is not None and index.tunable is not None:
            index.set_parameter(index.tunable.name, value)
        hits = answers(index, case, k, rows=rows)
        recall = None
        if case.matches is not None:
            recall = recall_at(first_correct_ranks(hits.scores, hits.ids, case.matches), 1)
        points.append(
            SweepPoint(
                value=value,
                ann_recall=ann_recall(hits, case, [k], rows=rows)[k],
                recall_at_1=recall,
                milliseconds_per_query=milliseconds_per_query(index, case.queries, k),
            )
        )
    return points


def compare_all(
    cases: Sequence[SearchCase],
    factories: Sequence[str],
    *,
    ks: Sequence[int] = (1, 5, 10),
    target_recall: float = 0.95,
    memory_budget_bytes: int,
    device: str | None = None,
) -> Iterator[tuple[ApproximateIndex, SearchCase, Comparison]]:
    """Compare every factory in every case, and build each index of the same vectors once.

    An index is given as the comparison left it, and can be measured further before the next.

    Args:
        cases: Made with the same `ks`.
        factories: As for `build_index`, or `auto`, whose results are called by what was chosen.
        ks: The numbers of answers to look at.
        target_recall: What search parameters are tuned to, and `auto` is chosen for.
        memory_budget_bytes: What an index that `auto` chooses may take.
        device: As for `build_index`.

    Raises:
        SearchIndexError: as `build_index` and `choose_factory`.
    """
    for factory in factories:
        built: dict[int, ApproximateIndex] = {}
        for case in cases:
            chosen, vectors = factory, case.candidates
            if factory == AUTO:
                chosen = choose_factory(
                    *vectors.shape,
                    memory_budget_bytes=memory_budget_bytes,
                    target_recall=target_recall,
                )
            if id(vectors) not in built:
                built[id(vectors)] = build_index(vectors, chosen, device=device)
            index = built[id(vectors)]
            found = compare(index, case, ks=ks, target_recall=target_recall)
            name = chosen if factory != AUTO else f"{AUTO}: {chosen}"
            yield index, case, replace(found, factory=name)


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


def _tune(
    index: ApproximateIndex,
    case: SearchCase,
    rows: Int[np.ndarray, " rows"],
    *,
    k: int,
    target: float,
) -> bool:
    """Set the search parameter to the smallest value that reaches the target; say if one does."""
    assert index.tunable is not None
    name, known = index.tunable.name, dict[int, float]()

    def recall_of(value: int) -> float:
        if value not in known:
            index.set_parameter(name, value)
            known[value] = ann_recall(answers(index, case, k, rows=rows), case, [k], rows=rows)[k]
        return known[value]

    value = smallest_reaching(recall_of, high=index.tunable.high, target=target)
    index.set_parameter(name, value)
    return recall_of(value) >= target
