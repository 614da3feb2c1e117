"""Searches whose exact answers are known, to measure indexes by."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import faiss
import numpy as np
from jaxtyping import Float32, Int, Int64

from vlm.errors import SearchIndexError
from vlm.evaluation.retrieval.comparison import compare
from vlm.evaluation.retrieval.metrics import Ranks
from vlm.search.index import ROUNDING, Hits, VectorIndex, cosines_of

KS = (1, 5, 10)
"""The numbers of answers that are looked at."""

MOST = max(KS)

BATCH = 32
"""Queries that are searched for at a time when the time is taken, on one thread."""

_BATCHES = 15


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


def cases_of(
    images: Float32[np.ndarray, "images dim"],
    texts: Mapping[str, tuple[Float32[np.ndarray, "texts dim"], Int[np.ndarray, "matches 2"]]],
    *,
    ranks: Mapping[str, Ranks] | None = None,
    device: str | None = None,
) -> list[SearchCase]:
    """Search exactly, in both directions of every language and among the images themselves.

    Queries of one kind in an index of the other lie farther from all they find than those of its
    own kind, and so lose more: the last case shows how much is due to that.

    Args:
        images: Unit vectors.
        texts: By language, unit vectors and the pairs (text, image) that belong together.
        ranks: By language, the exact ranks, where they are known.
        device: Where to find them, where they are not.

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
        if ranks is None:
            own = compare(vectors, images, matches, device=device).ranks
        else:
            own = ranks[language]
        sides = (vectors, images)
        cases.append(_case("text_to_image", language, sides, matches, own["text_to_image"]))
        mirrored = np.stack([places, matches[:, 0]], axis=1)
        sides = (np.ascontiguousarray(images[asked]), vectors)
        cases.append(_case("image_to_text", language, sides, mirrored, own["image_to_text"]))
    if len(images) > 1:
        cases.append(_case("image_to_image", "", (images, images)))
    return cases


def answers(index: VectorIndex, case: SearchCase, *, rows: Int[np.ndarray, " rows"]) -> Hits:
    """Search for the queries `rows`; of a case without correct answers each is left out itself.

    The index is asked for one answer more than is looked at, so that a wrong one which ties with
    the last correct one is seen.
    """
    hits = index.search(case.queries[rows], MOST + 1)
    return _without_self(hits, rows) if case.matches is None else hits


def ann_recall(
    hits: Hits, case: SearchCase, *, rows: Int[np.ndarray, " rows"], ks: Sequence[int] = KS
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
    rows = np.arange(BATCH * _BATCHES).reshape(_BATCHES, BATCH) % len(queries)
    batches = [np.ascontiguousarray(queries[each]) for each in rows]
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        index.search(batches[0], MOST)  # the first search pays for what later ones share
        seconds = []
        for batch in batches:
            start = time.perf_counter()
            index.search(batch, MOST)
            seconds.append(time.perf_counter() - start)
    finally:
        faiss.omp_set_num_threads(threads)
    return float(1000 * np.median(seconds) / BATCH)


def _case(
    direction: str,
    language: str,
    sides: tuple[Float32[np.ndarray, "queries dim"], Float32[np.ndarray, "candidates dim"]],
    matches: Int[np.ndarray, "matches 2"] | None = None,
    ranks: Int64[np.ndarray, " queries"] | None = None,
) -> SearchCase:
    queries, candidates = sides
    exact = VectorIndex.build(candidates)
    hits = exact.search(queries, MOST + 1)
    if matches is None:
        hits = _without_self(hits, np.arange(len(queries)))
    return SearchCase(
        direction=direction,
        language=language,
        queries=queries,
        candidates=candidates,
        matches=matches,
        ranks=ranks,
        nearest=hits.scores[:, :MOST],
        exact_milliseconds=milliseconds_per_query(exact, queries),
    )


def _without_self(hits: Hits, rows: Int[np.ndarray, " rows"]) -> Hits:
    """Drop of each row the query itself, or the last hit where it did not find itself."""
    order = np.argsort(hits.ids == rows[:, None], axis=1, kind="stable")[:, :-1]
    return Hits(
        np.take_along_axis(hits.scores, order, axis=1), np.take_along_axis(hits.ids, order, axis=1)
    )
