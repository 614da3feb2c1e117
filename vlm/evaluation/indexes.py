"""Approximate search compared with exact search: what an index costs, in recall and in time."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import faiss
import numpy as np
from jaxtyping import Float32, Int, Int64

from vlm.errors import SearchIndexError
from vlm.evaluation.config import IndexPlan
from vlm.evaluation.retrieval.comparison import compare
from vlm.evaluation.retrieval.metrics import Ranks, first_correct_ranks, recall_at
from vlm.search.index import (
    AUTO,
    ROUNDING,
    Hits,
    VectorIndex,
    check_factory,
    choose_factory,
    cosines_of,
)

_KS = (1, 5, 10)  # the numbers of answers that are looked at
_MOST = max(_KS)
_BATCH, _BATCHES = 32, 15  # queries searched for at a time when the time is taken
_MOST_TUNING = 1000
_WARN_ABOVE = 0.01  # loss of R@1
_TIMING = f"median of batches of {_BATCH} queries, one thread, {_MOST} answers"


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchCase:
    """Queries, what they search in, and the answers of an exact search."""

    direction: str
    """`text_to_image`, `image_to_text`, or `image_to_image` for contrast."""
    language: str
    """Of the texts; empty for images among images."""
    queries: Float32[np.ndarray, "queries dim"]
    candidates: Float32[np.ndarray, "candidates dim"]
    matches: Int[np.ndarray, "matches 2"] | None
    """Correct pairs (query, candidate); None where every query is a candidate itself, which then
    is no answer."""
    ranks: Int[np.ndarray, " queries"] | None
    """Exact ranks of the best correct answers."""
    nearest: Float32[np.ndarray, "queries neighbours"]
    """Cosines of the nearest candidates, best first."""
    exact_milliseconds: float
    """Time of an exact search a query, by FAISS's flat index."""

    @property
    def name(self) -> str:
        """Such as `zh text to image`."""
        return f"{self.language} {self.direction.replace('_', ' ')}".strip()


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What an index finds and costs in a case. Recalls are by k, ratios in [0, 1]."""

    factory: str
    search: str
    """The case's name."""
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
    k: int = _MOST
    """The largest number of answers that was looked at; that of `ann_recall` in the curves."""

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
    """Refuse indexes that FAISS does not know for vectors of this width, by SearchIndexError."""
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
            place = id(case.candidates)
            if place not in built:
                built[place] = VectorIndex.build(case.candidates, chosen, device=device)
            found = compare_with_exact(built[place], case, target_recall=plan.target_recall)
            comparisons.append(replace(found, factory=name))
            if plan.sweep:
                curves.setdefault(case.name, {})[name] = sweep(built[place], case)
    return IndexReport(
        plan=plan,
        images=len(images),
        dim=images.shape[1],
        comparisons=comparisons,
        curves=curves,
        exact_milliseconds={case.name: case.exact_milliseconds for case in cases},
    )


def compare_with_exact(
    index: VectorIndex, case: SearchCase, *, target_recall: float | None = 0.95
) -> Comparison:
    """Compare an index with exact search, after tuning it on half of the queries.

    The search parameter is tuned to find the ratio `target_recall` of the ten nearest neighbours,
    on up to 1000 queries; None leaves the index as it is.
    """
    rows = np.arange(len(case.queries))
    judged, reached = rows, True
    if target_recall is not None and index.tunable is not None:
        shuffled = np.random.default_rng(0).permutation(rows)
        half = min(len(rows) // 2, _MOST_TUNING)
        judged = shuffled[half:]
        tuning = shuffled[:half] if half else shuffled
        reached = index.tune(
            lambda: ann_recall(answers(index, case, rows=tuning), case, rows=tuning)[_MOST],
            target=target_recall,
        )
    hits = answers(index, case, rows=rows)
    exact, approximate = {}, {}
    if case.matches is not None and case.ranks is not None:
        ranks = first_correct_ranks(hits.scores, hits.ids, case.matches)
        exact = {k: recall_at(case.ranks, k) for k in _KS}
        approximate = {k: recall_at(ranks, k) for k in _KS}
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
    points = []
    for value in values:
        if value is not None and index.tunable is not None:
            index.set_parameter(index.tunable.name, value)
        found = compare_with_exact(index, case, target_recall=None)
        points.append(
            SweepPoint(
                value=value,
                ann_recall=found.ann_recall[_MOST],
                recall_at_1=found.index_recall.get(1),
                milliseconds_per_query=found.milliseconds_per_query,
            )
        )
    return points


def loss_of(comparison: Comparison) -> str | None:
    """Return a sentence where an index costs more than a point of R@1."""
    if 1 not in comparison.exact_recall:
        return None
    exact, found = comparison.exact_recall[1], comparison.index_recall[1]
    if exact - found <= _WARN_ABOVE + 1e-9:
        return None
    return (
        f"{comparison.factory} costs {100 * (exact - found):.1f} points of R@1 in "
        f"{comparison.search}: {found:.3f}, and {exact:.3f} by exact search"
    )


def cases_of(
    images: Float32[np.ndarray, "images dim"],
    texts: Mapping[str, tuple[Float32[np.ndarray, "texts dim"], Int[np.ndarray, "matches 2"]]],
    *,
    ranks: Mapping[str, Ranks] | None = None,
    device: str | None = None,
) -> list[SearchCase]:
    """Search exactly, in both directions of every language and among the images themselves.

    Queries of one kind in an index of the other lie farther from all they find than those of its
    own kind, and so lose more: the last case shows how much is due to that. The arguments are those
    of `compare_indexes`.

    Raises:
        SearchIndexError: there are no images or, in a language, no correct pairs.
    """
    pairs = [len(matches) for _, matches in texts.values()]
    if not len(images) or not all(pairs):
        raise SearchIndexError(
            f"cannot compare searches with {len(images)} images and {pairs} correct pairs by "
            "language; expected at least one of each"
        )
    cases = []
    for language, (vectors, matches) in texts.items():
        asked, places = np.unique(matches[:, 1], return_inverse=True)
        known = ranks or {language: compare(vectors, images, matches, device=device).ranks}
        mirrored = np.stack([places, matches[:, 0]], axis=1)
        captioned = np.ascontiguousarray(images[asked])
        for direction, queries, candidates, correct in (
            ("text_to_image", vectors, images, matches),
            ("image_to_text", captioned, vectors, mirrored),
        ):
            own = known[language][direction]
            cases.append(_case(direction, language, queries, candidates, correct, own))
    if len(images) > 1:
        cases.append(_case("image_to_image", "", images, images))
    return cases


def answers(index: VectorIndex, case: SearchCase, *, rows: Int[np.ndarray, " rows"]) -> Hits:
    """Search for the queries `rows`; of a case without correct answers each is left out itself.

    The index is asked for one answer more than is looked at, so that a wrong one which ties with
    the last correct one is seen.
    """
    hits = index.search(case.queries[rows], _MOST + 1)
    return _without_self(hits, rows) if case.matches is None else hits


def ann_recall(
    hits: Hits, case: SearchCase, *, rows: Int[np.ndarray, " rows"], ks: Sequence[int] = _KS
) -> dict[int, float]:
    """Return the ratio of the nearest k candidates that the hits of the queries `rows` hold.

    A hit whose true cosine is that of the k-th neighbour or more counts, as ann-benchmarks does
    it, so that it does not matter which of equal vectors was found.
    """
    cosines = cosines_of(hits.ids, case.queries[rows], case.candidates)
    found = {}
    for k in ks:
        nearest = case.nearest[rows][:, :k]
        found[k] = float((cosines[:, : nearest.shape[1]] >= nearest[:, -1:] - ROUNDING).mean())
    return found


def milliseconds_per_query(
    index: VectorIndex, queries: Float32[np.ndarray, "queries dim"]
) -> float:
    """Return the median time per query over 15 batches of 32 queries, on one thread."""
    rows = np.arange(_BATCH * _BATCHES).reshape(_BATCHES, _BATCH) % len(queries)
    batches = [np.ascontiguousarray(queries[each]) for each in rows]
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        index.search(batches[0], _MOST)  # the first search pays for what later ones share
        seconds = []
        for batch in batches:
            start = time.perf_counter()
            index.search(batch, _MOST)
            seconds.append(time.perf_counter() - start)
    finally:
        faiss.omp_set_num_threads(threads)
    return float(1000 * np.median(seconds) / _BATCH)


def _case(
    direction: str,
    language: str,
    queries: Float32[np.ndarray, "queries dim"],
    candidates: Float32[np.ndarray, "candidates dim"],
    matches: Int[np.ndarray, "matches 2"] | None = None,
    ranks: Int64[np.ndarray, " queries"] | None = None,
) -> SearchCase:
    exact = VectorIndex.build(candidates)
    hits = exact.search(queries, _MOST + 1)
    if matches is None:
        hits = _without_self(hits, np.arange(len(queries)))
    return SearchCase(
        direction=direction,
        language=language,
        queries=queries,
        candidates=candidates,
        matches=matches,
        ranks=ranks,
        nearest=hits.scores[:, :_MOST],
        exact_milliseconds=milliseconds_per_query(exact, queries),
    )


def _without_self(hits: Hits, rows: Int[np.ndarray, " rows"]) -> Hits:
    """Drop of each row the query itself, or the last hit where it did not find itself."""
    order = np.argsort(hits.ids == rows[:, None], axis=1, kind="stable")[:, :-1]
    return Hits(
        np.take_along_axis(hits.scores, order, axis=1), np.take_along_axis(hits.ids, order, axis=1)
    )
